"""One upload of a folder by one client, in a process of its own.

`python -m tests.bench.upload_arm ARM FOLDER URI ENDPOINT` prints seconds and CPU seconds as JSON. Imports are not counted.
Each client is used as its documentation or its caller does it.
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PART = 64 * 1024 * 1024


def ours(folder: Path, uri: str, endpoint: str) -> Callable[[], None]:
    """What a rank does with its files, SHA-256 included."""
    from dsft_trainer.checkpoint import files
    from dsft_trainer.checkpoint.store import open_store

    store = open_store(uri, endpoint_url=endpoint)
    # Clients are made on first use, from files that describe the service.
    store.get_bytes("nothing")
    return lambda: (files.upload(store, folder, "c", 0), None)[1]


def pyarrow(folder: Path, uri: str, endpoint: str) -> Callable[[], None]:
    """What `ray.train.report` does with a checkpoint's folder."""
    from pyarrow.fs import S3FileSystem
    from ray.train._internal.storage import _pyarrow_fs_copy_files

    scheme, _, address = endpoint.partition("://")
    target = S3FileSystem(scheme=scheme, endpoint_override=address, region=os.environ["AWS_REGION"])
    path = uri.removeprefix("s3://")
    return lambda: _pyarrow_fs_copy_files(str(folder), path, destination_filesystem=target)


def obstore(folder: Path, uri: str, endpoint: str) -> Callable[[], None]:
    """Its asynchronous way: parts of 64 MiB, 8 per file at a time, as many files as there are."""
    import obstore
    from obstore.store import S3Store

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    paths = sorted(folder.iterdir())
    store = S3Store(bucket, prefix=prefix, endpoint=endpoint, client_options={"allow_http": True})

    async def put_all() -> None:
        slots = asyncio.Semaphore(32)

        async def put(path: Path) -> None:
            async with slots:
                await obstore.put_async(store, path.name, path, chunk_size=PART, max_concurrency=8)

        await asyncio.gather(*(put(path) for path in paths))

    return lambda: asyncio.run(put_all())


def s5cmd(folder: Path, uri: str, endpoint: str) -> Callable[[], None]:
    """The command, with 32 workers and 8 parts of 64 MiB of a file at a time."""
    program = os.environ["S5CMD"]
    options = ("--endpoint-url", endpoint, "--numworkers", "32")
    copy = ("cp", "--concurrency", "8", "--part-size", "64", f"{folder}/*", f"{uri}/")
    return lambda: (subprocess.run([program, *options, *copy], check=True, stdout=subprocess.DEVNULL), None)[1]


ARMS = {"ours": ours, "pyarrow": pyarrow, "obstore": obstore, "s5cmd": s5cmd}


def cpu_seconds() -> float:
    """Of this process and those it waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def main(arm: str, folder: str, uri: str, endpoint: str) -> None:
    """Upload, and print what it took."""
    upload = ARMS[arm](Path(folder), uri, endpoint)
    cpu, begin = cpu_seconds(), time.monotonic()
    upload()
    print(json.dumps({"seconds": time.monotonic() - begin, "cpu": cpu_seconds() - cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:])
