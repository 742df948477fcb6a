"""What a database and its driver do differently: one file each, and nothing of it elsewhere."""

from sqlalchemy.engine import URL

from .mssql import SQLServerDialect
from .mysql import AiomysqlDialect, AsyncmyDialect, MySQLDialect
from .portable import PortableDialect, Timeouts
from .postgresql import AsyncpgDialect, PostgreSQLDialect
from .sqlite import AiosqliteDialect, SQLiteDialect

_PORTABLE: dict[str, type[PortableDialect]] = {
    "postgresql": PostgreSQLDialect,
    "mysql": MySQLDialect,
    "mariadb": MySQLDialect,
    "sqlite": SQLiteDialect,
    "mssql": SQLServerDialect,
}
_ON_THE_DRIVER: dict[str, type[PortableDialect]] = {
    "asyncpg": AsyncpgDialect,
    "aiomysql": AiomysqlDialect,
    "asyncmy": AsyncmyDialect,
    "aiosqlite": AiosqliteDialect,
}


def dialect_for(url: URL, timeouts: Timeouts, *, portable: bool = False) -> PortableDialect:
    """Return what the database of a URL does differently; ``portable`` keeps to SQLAlchemy's adapted cursor."""
    kind = _PORTABLE.get(url.get_backend_name(), PortableDialect)
    if not portable:
        kind = _ON_THE_DRIVER.get(url.get_driver_name(), kind)
    return kind(timeouts)


__all__ = ["PortableDialect", "Timeouts", "dialect_for"]
