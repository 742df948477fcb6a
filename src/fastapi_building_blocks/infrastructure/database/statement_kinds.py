"""What a single statement does, as far as its construct says: a repository's own has ``reads``, others are looked through."""

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors

_OF_ITS_SERVER = re.compile(
    r"pg_(try_)?advisory_|(get|release|release_all|is_free|is_used)_locks?$|(next|set|curr|last)val$|next_value$"
    r"|last_insert_id$",
    re.IGNORECASE,
)
"""Functions about a lock or a sequence, which a replica has none of, or one that is not the primary's."""
_READS = ("SELECT", "VALUES", "SHOW", "EXPLAIN")
"""How SQL begins that changes nothing, unless it calls a function that does."""


def is_read(statement: Any) -> bool:
    """Whether a single statement changes nothing and locks nothing, as far as its construct says."""
    reads = getattr(statement, "reads", None)
    if reads is not None:
        return bool(reads)
    return bool(getattr(statement, "is_select", False)) and not any(map(_may_change, visitors.iterate(statement)))


def _may_change(part: Any) -> bool:
    return (
        getattr(part, "is_dml", False)
        or getattr(part, "_for_update_arg", None) is not None
        or isinstance(part, sa.TextualSelect)
        or (
            isinstance(part, sa.sql.functions.FunctionElement)
            and _OF_ITS_SERVER.match(str(getattr(part, "name", ""))) is not None
        )
    )


def is_opaque(statement: Any) -> bool:
    """Whether nobody can tell from a read's construct that it writes nothing: SQL as text, or a function of one's own."""
    return getattr(statement, "reads", None) is None and any(
        type(part) is sa.sql.functions.Function
        or isinstance(part, sa.TextClause)
        or getattr(part, "is_literal", False) is True
        for part in visitors.iterate(statement)
    )


def may_write(statement: Any) -> bool:
    """Whether a single statement may have changed something before its answer was lost."""
    if isinstance(statement, sa.TextClause):
        return not statement.text.lstrip("( \n\t").upper().startswith(_READS)
    if getattr(statement, "is_select", False):
        # PostgreSQL has SELECT on what an INSERT, UPDATE or DELETE in its WITH clause answers.
        return any(getattr(part, "is_dml", False) for part in visitors.iterate(statement))
    return not getattr(statement, "reads", False)
