"""Criteria, sorts and positions of the query vocabulary as SQLAlchemy Core clauses.

A query is built in two steps. Its *shape* says which fields are compared how, and which values go with it;
queries of one shape differ in their values only, so the statement is compiled once and found again by its
shape. The *clauses* of a shape are then made with a placeholder for each value, in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from fastapi_building_blocks.domain.errors import InvalidQueryError
from fastapi_building_blocks.domain.query import And, Comparison, Criterion, Not, Operator, Or, Sort, extent_of
from fastapi_building_blocks.infrastructure.database.dialects import PortableDialect
from fastapi_building_blocks.infrastructure.persistence.repositories.column_rules import check_operand
from fastapi_building_blocks.infrastructure.persistence.repositories.declared_repository import Declaration, Position

Placeholder = Callable[[Any], Any]
"""Makes the placeholder of the next value, given its SQL type."""

_TEXT_OPERATORS = frozenset({Operator.CONTAINS, Operator.ICONTAINS, Operator.STARTS_WITH})
_COMPARE: dict[Operator, Callable[[Any, Any], Any]] = {
    Operator.EQ: lambda column, value: column == value,
    Operator.NE: lambda column, value: column != value,
    Operator.LT: lambda column, value: column < value,
    Operator.LE: lambda column, value: column <= value,
    Operator.GT: lambda column, value: column > value,
    Operator.GE: lambda column, value: column >= value,
}


class QueryClauses:
    """Shapes and clauses for one repository class on one database."""

    def __init__(self, declaration: Declaration[Any], dialect: PortableDialect) -> None:
        self._fields = declaration.field_types
        self._columns: dict[str, sa.Column[Any]] = {column.key: column for column in declaration.table.columns}
        self._dialect = dialect

    # Shapes

    def shape(self, criteria: Sequence[Criterion], values: list[Any]) -> tuple[Any, ...]:
        """Return the shape of criteria and append their checked values to ``values``.

        Raises:
            InvalidQueryError: a field is unknown or hidden, a value does not suit it, or there are too many.
        """
        extent_of(criteria)
        return tuple([self._shape(criterion, values) for criterion in criteria])

    def _shape(self, criterion: Criterion, values: list[Any]) -> Any:
        if isinstance(criterion, Comparison):
            return self._comparison_shape(criterion, values)
        if isinstance(criterion, And | Or):
            return (type(criterion), *[self._shape(part, values) for part in criterion.parts])
        if isinstance(criterion, Not):
            return (Not, self._shape(criterion.part, values))
        raise TypeError(f"expected a criterion or a SQLAlchemy expression, got {type(criterion).__name__}")

    def _comparison_shape(self, comparison: Comparison, values: list[Any]) -> Any:
        name, operator = comparison.field, comparison.operator
        if name not in self._fields:
            raise InvalidQueryError(f"there is no field {name!r} to filter or sort by", fields=(str(name),))
        value = check_operand(self._columns[name], operator, comparison.value)
        if operator is Operator.IS_NULL:
            return (name, operator, value)
        if operator in (Operator.IN, Operator.NOT_IN):
            return self._list_shape(name, operator, value, values)
        if operator is Operator.BETWEEN:
            values.extend(value)
        elif operator in _TEXT_OPERATORS:
            values.append(self._dialect.text_operand(operator, value))
        else:
            values.append(value)
        return (name, operator)

    def _list_shape(self, name: str, operator: Operator, items: Sequence[Any], values: list[Any]) -> Any:
        if self._dialect.array_parameters:
            values.append(list(items))
            return (name, operator)
        if len(items) > self._dialect.largest_statement // 2:
            raise InvalidQueryError(f"{name}: too many values in one list", fields=(name,))
        if not items:
            return (name, operator, 0)
        # Filled up to a power of two with the last value again, so that there are few shapes.
        size = 1 << (len(items) - 1).bit_length()
        values.extend(items)
        values.extend([items[-1]] * (size - len(items)))
        return (name, operator, size)

    # Clauses

    def clauses(self, shape: Sequence[Any], placeholder: Placeholder) -> list[Any]:
        """Return the WHERE clauses of a shape, with a placeholder for each of its values in order."""
        return [self._clause(part, placeholder) for part in shape]

    def _clause(self, shape: Any, placeholder: Placeholder) -> Any:
        head = shape[0]
        if head is And:
            return sa.and_(*[self._clause(part, placeholder) for part in shape[1:]])
        if head is Or:
            return sa.or_(*[self._clause(part, placeholder) for part in shape[1:]])
        if head is Not:
            return sa.not_(self._clause(shape[1], placeholder))
        column = self._columns[head]
        operator = shape[1]
        if operator is Operator.IS_NULL:
            return column.is_(None) if shape[2] else column.is_not(None)
        if operator in (Operator.IN, Operator.NOT_IN):
            return self._list_clause(column, operator is Operator.NOT_IN, shape, placeholder)
        if operator in _TEXT_OPERATORS:
            return self._dialect.text_search(operator, column, placeholder(sa.String()))
        if operator in (Operator.EQ, Operator.NE):
            return _COMPARE[operator](column, placeholder(column.type))
        if operator is Operator.BETWEEN:
            low, high = (self._ordered(column, placeholder(column.type)) for _ in range(2))
            return self._ordered(column, column).between(low, high)
        return _COMPARE[operator](*self._sides(column, placeholder))

    def _list_clause(self, column: Any, negated: bool, shape: Any, placeholder: Placeholder) -> Any:
        if self._dialect.array_parameters:
            array = placeholder(sa.ARRAY(column.type))
            return column != sa.all_(array) if negated else column == sa.any_(array)
        size = shape[2]
        if size == 0:
            return sa.true() if negated else sa.false()
        placeholders = [placeholder(column.type) for _ in range(size)]
        return column.not_in(placeholders) if negated else column.in_(placeholders)

    # Order and position

    def _is_ranked(self, column: Any) -> bool:
        native = self._dialect.native_enums and getattr(column.type, "native_enum", False)
        return isinstance(column.type, sa.Enum) and not native

    def _ordered(self, column: Any, value: Any) -> Any:
        """Return what orders a value of a column: itself, or an enumeration's place where the database goes by names."""
        if not self._is_ranked(column):
            return value
        places: dict[Any, Any] = {name: sa.literal_column(str(place)) for place, name in enumerate(column.type.enums)}
        return sa.case(places, value=value)

    def _sides(self, column: Any, placeholder: Placeholder) -> tuple[Any, Any]:
        """Return a column and the placeholder of a value, so that they compare as they are ordered."""
        return self._ordered(column, column), self._ordered(column, placeholder(column.type))

    def _sort_key(self, name: str) -> Any:
        column = self._columns[name]
        key: Any = self._ordered(column, column)
        key.nullable = column.nullable
        return key

    def order(self, order: Sequence[Sort], nulls: Sequence[bool] | None = None) -> list[Any]:
        """Return the ORDER BY clauses of a total order; ``nulls`` is the shape of the position that it is read from."""
        clauses = []
        for place, key in enumerate(order):
            column = self._sort_key(key.field)
            if place == 0 and nulls is not None and not nulls[0] and not key.nulls_last:
                # No NULL of the first key lies behind a value, so that the index serves without a word on NULLs.
                clauses.append(column.desc() if key.descending else column.asc())
                continue
            clauses += self._dialect.order(column, descending=key.descending, nulls_last=key.nulls_last)
        return clauses

    def position_shape(self, position: Position, order: Sequence[Sort], values: list[Any]) -> tuple[Any, ...]:
        """Return the shape of a keyset position and append its values; ``order`` is in the direction of reading."""
        key = tuple(value is None for value in position.values)
        if self._by_row_values(order, key):
            values.extend(position.values)
        else:
            values.extend(value for value, _ in self._position_values(position.values))
        return key

    def _position_values(self, items: Sequence[Any]) -> Iterator[tuple[Any, int]]:
        """Yield the values in the order in which ``position`` makes their placeholders."""
        if items[0] is not None:
            yield items[0], 0
        for last in range(len(items)):
            for place in range(last):
                if items[place] is not None:
                    yield items[place], place
            if items[last] is not None:
                yield items[last], last

    def _by_row_values(self, order: Sequence[Sort], nulls: Sequence[bool]) -> bool:
        same_direction = len({key.descending for key in order}) == 1
        nullable = any(self._columns[key.field].nullable or self._is_ranked(self._columns[key.field]) for key in order)
        return self._dialect.row_values and same_direction and not nullable and not any(nulls) and len(order) > 1

    def position(self, nulls: Sequence[bool], order: Sequence[Sort], placeholder: Placeholder) -> Any:
        """Return the clause for what lies behind a row in a total order.

        One comparison of whole rows where the database answers it from an index. Elsewhere the first key bounds
        the scan, and ``(a > :a) OR (a = :a AND b > :b) OR …`` decides within it. Where NULLs come behind the values
        of that key no range holds both: the page is exact, but costs what lies before it.
        """
        columns = [self._columns[key.field] for key in order]
        if self._by_row_values(order, nulls):
            row = sa.tuple_(*columns)
            bound = sa.tuple_(*[placeholder(column.type) for column in columns])
            return row < bound if order[0].descending else row > bound
        bounds = [self._bound(columns[0], order[0], nulls[0], placeholder)]
        steps = []
        for last in range(len(order)):
            equal = [
                column.is_(None) if is_null else column == placeholder(column.type)
                for column, is_null in zip(columns[:last], nulls[:last], strict=True)
            ]
            steps.append(sa.and_(*equal, self._behind(columns[last], order[last], nulls[last], placeholder)))
        return sa.and_(*[bound for bound in bounds if bound is not None], sa.or_(*steps))

    def _behind(self, column: Any, key: Sort, is_null: bool, placeholder: Placeholder) -> Any:
        if is_null:
            return sa.false() if key.nulls_last else column.is_not(None)
        side, value = self._sides(column, placeholder)
        after = side < value if key.descending else side > value
        return sa.or_(after, column.is_(None)) if column.nullable and key.nulls_last else after

    def _bound(self, column: Any, key: Sort, is_null: bool, placeholder: Placeholder) -> Any:
        if is_null:
            return column.is_(None) if key.nulls_last else None
        side, value = self._sides(column, placeholder)
        within = side <= value if key.descending else side >= value
        return sa.or_(within, column.is_(None)) if column.nullable and key.nulls_last else within
