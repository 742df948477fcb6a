"""What a database and its driver do differently: one file each, and nothing of it elsewhere."""

from sqlalchemy.engine import URL

from .mssql import SQLServerDialect
from .mysql import AiomysqlDialect, AsyncmyDialect, MySQLDialect
from .pgbouncer import AsyncpgPgBouncerDialect, PgBouncerDialect
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


def dialect_for(url: URL, timeouts: Timeouts, *, portable: bool = False, pgbouncer: bool = False) -> PortableDialect:
    """Return what the database of a URL does differently.

    Args:
        portable: keep to SQLAlchemy's adapted cursor.
        pgbouncer: the URL leads to PgBouncer in transaction mode.

    Raises:
        ValueError: PgBouncer has no such database behind it, or the driver cannot be used with it.
    """
    if pgbouncer:
        if url.drivername != "postgresql+asyncpg":
            raise ValueError(f"pgbouncer=True goes with postgresql+asyncpg:// only, not with {url.drivername}://")
        return (PgBouncerDialect if portable else AsyncpgPgBouncerDialect)(timeouts)
    kind = _PORTABLE.get(url.get_backend_name(), PortableDialect)
    if not portable:
        kind = _ON_THE_DRIVER.get(url.get_driver_name(), kind)
    return kind(timeouts)


__all__ = ["PortableDialect", "Timeouts", "dialect_for"]
