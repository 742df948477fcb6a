"""What happens to the servers of a soak meanwhile, one fault at a time on each."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from fastapi_building_blocks.testing import DatabaseServer, FaultProxy
from tests.server_view import kill_connections

COMMIT = {"postgresql": b"COMMIT", "mysql": b"\x03COMMIT"}  # not the one in SET AUTOCOMMIT


class Chaos:
    """Breaks one server and the connections to it, and heals them again."""

    def __init__(self, server: DatabaseServer, proxy: FaultProxy, url: str, chance: random.Random) -> None:
        self._server = server
        self._proxy = proxy
        self._url = url
        self._chance = chance
        self.counts: Counter[str] = Counter()
        self.now = "none"
        self.calm = asyncio.Lock()
        """Held while something is broken; whoever holds it sees a healthy server."""

    async def run(self) -> None:
        """Break something, heal it, and leave a while in peace; without end."""
        while True:
            await asyncio.sleep(self._chance.uniform(0.2, 2.5))
            async with self.calm:
                self.now = self._chance.choice(list(FAULTS))
                self.counts[self.now] += 1
                fault = asyncio.ensure_future(FAULTS[self.now](self))
                try:
                    await asyncio.shield(fault)
                except asyncio.CancelledError:
                    await fault  # a server that is killed has to start again
                    raise
                finally:
                    self._proxy.heal()
                    self._server.thaw()
                    self.now = "none"

    async def _a_while(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.2, 2))

    async def latency(self) -> None:
        self._proxy.latency(self._chance.uniform(0.005, 0.05))
        await self._a_while()

    async def reset(self) -> None:
        self._proxy.reset(new=self._chance.random() < 0.5)
        await asyncio.sleep(self._chance.uniform(0, 0.5))

    async def cut(self) -> None:
        self._proxy.cut_after(int(2 ** self._chance.uniform(0, 17)))
        await self._a_while()

    async def blackhole(self) -> None:
        self._proxy.blackhole(self._chance.choice(["both", "to_client", "to_server"]))
        await self._a_while()

    async def refuse(self) -> None:
        self._proxy.refuse()
        await self._a_while()

    async def lose_commits(self) -> None:
        message = COMMIT["postgresql" if self._url.startswith("postgresql") else "mysql"]
        if self._chance.random() < 0.5:
            self._proxy.drop_answer_to(message, times=5)
        else:
            self._proxy.drop_message(message, times=5)
        await self._a_while()

    async def freeze(self) -> None:
        self._server.freeze()
        await self._a_while()

    async def restart(self) -> None:
        self._server.kill()
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        await asyncio.to_thread(self._server.start)

    async def kill_connections(self) -> None:
        await asyncio.to_thread(_kill_connections, self._url)


def _kill_connections(url: str) -> None:
    try:
        kill_connections(url)
    except Exception as error:
        if "1094" not in str(error):
            raise


FAULTS: dict[str, Callable[[Chaos], Awaitable[None]]] = {
    "latency": Chaos.latency,
    "reset": Chaos.reset,
    "cut": Chaos.cut,
    "black hole": Chaos.blackhole,
    "refused": Chaos.refuse,
    "COMMIT lost": Chaos.lose_commits,
    "frozen": Chaos.freeze,
    "killed and restarted": Chaos.restart,
    "connections killed": Chaos.kill_connections,
}
