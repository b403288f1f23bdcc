"""A way to the API server that can be cut: TCP through a process that is stopped, so that requests hang as in a dead network."""

import asyncio
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml


@dataclass(frozen=True)
class Way:
    """A kubeconfig whose connections pass through here."""

    kubeconfig: Path
    process: "subprocess.Popen[str]"

    @classmethod
    def to(cls, kubeconfig: Path, folder: Path) -> "Way":
        """Beside the way that a kubeconfig has."""
        document = yaml.safe_load(kubeconfig.read_text())
        (cluster,) = document["clusters"]
        server = urlsplit(cluster["cluster"]["server"])
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(server.hostname), str(server.port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        cluster["cluster"]["server"] = f"https://127.0.0.1:{int(process.stdout.readline())}"
        path = folder / "way.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return cls(path, process)

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told."""
        self.process.send_signal(signal.SIGSTOP)

    def mend(self) -> None:
        """What was held passes now."""
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


async def _serve(host: str, port: int) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
