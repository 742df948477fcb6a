"""Criteria and sorts, evaluated on rows in memory as SQL evaluates them: three-valued, NULLs placed, text literal.

Text is compared and ordered by code point; ``icontains`` compares in lower case.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import InvalidQueryError, UnsupportedOperationError
from fastapi_building_blocks.domain.query import And, Comparison, Criterion, Not, Operator, Or, Sort
from fastapi_building_blocks.infrastructure.database.dialects.portable import lower_case
from fastapi_building_blocks.infrastructure.persistence.repositories.column_rules import check_operand

Row = tuple[Any, ...]
Truth = bool | None
"""True, False, or None for SQL's unknown."""
Test = Callable[[Row], Truth]

_ORDERED: dict[Operator, Callable[[Any, Any], bool]] = {
    Operator.LT: operator.lt,
    Operator.LE: operator.le,
    Operator.GT: operator.gt,
    Operator.GE: operator.ge,
}
_TEXTUAL: dict[Operator, Callable[[str, str], bool]] = {
    Operator.CONTAINS: lambda text, part: part in text,
    Operator.ICONTAINS: lambda text, part: lower_case(part) in lower_case(text),
    Operator.STARTS_WITH: str.startswith,
}


class InMemoryQuery:
    """The columns of a table, to evaluate criteria and sorts on its rows."""

    def __init__(self, columns: Mapping[str, sa.Column[Any]]) -> None:
        self._columns = columns
        self._positions = {name: position for position, name in enumerate(columns)}

    def test(self, criteria: Iterable[Criterion]) -> Test:
        """Return what tells of a row whether all criteria hold.

        Raises:
            InvalidQueryError: an operator or a value does not suit its field.
            UnsupportedOperationError: a SQLAlchemy expression; there is no database to evaluate it.
        """
        return _all([self._test(criterion) for criterion in criteria])

    def _test(self, criterion: Any) -> Test:
        if isinstance(criterion, Comparison):
            return self._comparison(criterion)
        if isinstance(criterion, And):
            return _all([self._test(part) for part in criterion.parts])
        if isinstance(criterion, Or):
            return _any([self._test(part) for part in criterion.parts])
        if isinstance(criterion, Not):
            return _not(self._test(criterion.part))
        if isinstance(criterion, sa.ClauseElement):
            raise UnsupportedOperationError("a repository in memory takes field() criteria, not SQLAlchemy expressions")
        raise TypeError(f"expected a criterion such as field('name') == 'Ada', got {type(criterion).__name__}")

    def _comparison(self, comparison: Comparison) -> Test:
        asked = comparison.operator
        column = self._columns[comparison.field]
        value = check_operand(column, asked, comparison.value)
        position = self._positions[comparison.field]
        if asked is Operator.IS_NULL:
            return lambda row: (row[position] is None) is value
        if asked in (Operator.IN, Operator.NOT_IN):
            one_of = _any([_when_known(position, item, operator.eq) for item in value])
            return one_of if asked is Operator.IN else _not(one_of)
        if asked in (Operator.EQ, Operator.NE):
            equal = _when_known(position, value, operator.eq)
            return equal if asked is Operator.EQ else _not(equal)
        if asked in _TEXTUAL:
            return _when_known(position, value, _TEXTUAL[asked])
        if asked is Operator.BETWEEN:
            low, high = value
            return _all([self._ordered(column, low, Operator.GE), self._ordered(column, high, Operator.LE)])
        return self._ordered(column, value, asked)

    def _ordered(self, column: sa.Column[Any], value: Any, asked: Operator) -> Test:
        rank, compare = _rank(column), _ORDERED[asked]
        ranked = None if value is None else rank(value)
        return _when_known(
            self._positions[column.key], ranked, lambda stored, given: compare(rank(stored), given), column.key
        )

    # Sorts

    def keys(self, row: Row, order: Sequence[Sort]) -> tuple[Any, ...]:
        """Return a row's sort keys, as a cursor holds them."""
        return tuple(row[self._positions[key.field]] for key in order)

    def sort(self, rows: Iterable[Row], order: Sequence[Sort]) -> list[Row]:
        """Return the rows in order.

        Raises:
            InvalidQueryError: a field's values have no order.
        """
        found = list(rows)
        for key in reversed(order):  # a stable sort by the last key first
            try:
                found.sort(key=self._row_weigher(key), reverse=key.descending)
            except TypeError as error:
                raise _no_order(key.field) from error
        return found

    def behind(self, order: Sequence[Sort], values: Sequence[Any]) -> Callable[[Row], bool]:
        """Return what tells of a row whether it comes after the one with these sort keys."""
        keys = [
            (self._positions[key.field], weigh := self._weigher(key), weigh(value), key.descending)
            for key, value in zip(order, values, strict=True)
        ]

        def is_behind(row: Row) -> bool:
            for position, weigh, given, descending in keys:
                weight = weigh(row[position])
                if weight != given:
                    return bool((weight < given) if descending else (weight > given))
            return False

        return is_behind

    def _row_weigher(self, key: Sort) -> Callable[[Row], tuple[Any, ...]]:
        position, weigh = self._positions[key.field], self._weigher(key)
        return lambda row: weigh(row[position])

    def _weigher(self, key: Sort) -> Callable[[Any], tuple[Any, ...]]:
        """Return what makes a sort key of a value, so that NULL lands where the sort says."""
        rank = _rank(self._columns[key.field])
        null = (1,) if key.nulls_last is not key.descending else (-1,)
        return lambda value: null if value is None else (0, rank(value))


def _rank(column: sa.Column[Any]) -> Callable[[Any], Any]:
    """Return what makes a value comparable; an enumeration is ordered as it is declared."""
    kind = column.type
    if not isinstance(kind, sa.Enum):
        return lambda value: value
    members = list(kind.enum_class) if kind.enum_class is not None else kind.enums
    return members.index


def _no_order(name: str) -> InvalidQueryError:
    return InvalidQueryError(f"{name}: its values have no order", fields=(name,))


def _when_known(position: int, value: Any, compare: Callable[[Any, Any], bool], name: str = "") -> Test:
    def test(row: Row) -> Truth:
        stored = row[position]
        if stored is None or value is None:
            return None
        try:
            return compare(stored, value)
        except TypeError as error:
            raise _no_order(name) from error

    return test


def _all(tests: list[Test]) -> Test:
    def test(row: Row) -> Truth:
        answer: Truth = True
        for each in tests:
            truth = each(row)
            if truth is False:
                return False
            if truth is None:
                answer = None
        return answer

    return tests[0] if len(tests) == 1 else test


def _any(tests: list[Test]) -> Test:
    def test(row: Row) -> Truth:
        answer: Truth = False
        for each in tests:
            truth = each(row)
            if truth:
                return True
            if truth is None:
                answer = None
        return answer

    return test


def _not(test: Test) -> Test:
    def negated(row: Row) -> Truth:
        truth = test(row)
        return None if truth is None else not truth

    return negated
