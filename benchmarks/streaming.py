#!/usr/bin/env python
"""Measure --streaming: what an epoch downloads, the room it takes on the disk, images a second, and its start.

    python benchmarks/streaming.py                 4,000 images in tables, from a hub on loopback
    python benchmarks/streaming.py --shards        in tar shards

Images are read in the order of an epoch, in batches, and decoded, as a run without data workers does; the network
that would be trained is left out. The same images are then read from a local copy of the tables without --streaming,
in the order of such a run. Chunks have 2 MiB instead of 64, so that there are as many as in a dataset of 10 GB.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

FILES, ROWS, GROUP = 20, 200, 20
NAME = "some/images"


def jpeg(index):
    """An image of 512 pixels a side that another one does not resemble, about 130 kB."""
    coarse = np.random.default_rng(index).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(content, "jpeg", quality=90)
    return content.getvalue()


def write(folder, shards):
    """The dataset, as files in a folder."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for file in range(FILES):
        samples = [(index, jpeg(index), f"image {index}") for index in range(file * ROWS, (file + 1) * ROWS)]
        if shards:
            with tarfile.open(folder / f"{file:03}.tar", "w") as tar:
                for index, content, text in samples:
                    for ending, part in (("jpg", content), ("txt", text.encode())):
                        member = tarfile.TarInfo(f"{index:06}.{ending}")
                        member.size = len(part)
                        tar.addfile(member, io.BytesIO(part))
        else:
            cells = [{"bytes": content, "path": None} for _, content, _ in samples]
            table = pyarrow.table({"image": cells, "text": [text for _, _, text in samples]})
            pyarrow.parquet.write_table(table, folder / f"train-{file:03}.parquet", row_group_size=GROUP)


def serve(root, folder, pipe):
    """A hub with this dataset, until something comes through the pipe; tells its address, then what it has sent."""
    from hub_server import Hub

    with Hub(root) as hub:
        hub.add(NAME, folder, kind="datasets")
        pipe.send(hub.url)
        while pipe.recv() == "sent":
            pipe.send(sum(size for path, size in hub.sent if path.startswith("/lfs/")))


def read(plan, dataset, after_batch=None):
    """Read and decode an epoch. Returns (seconds to the first batch, seconds for all, images)."""
    from training_utils.data.plan import Position

    began, first, count = time.perf_counter(), None, 0
    for at, batch in enumerate(plan.batches(Position())):
        if at == plan.steps_per_epoch:
            break
        for _, index, _ in batch:
            dataset.captions(index)
            dataset.image(index)
        count += len(batch)
        first = first or time.perf_counter() - began
        if after_batch:
            after_batch()
    return first, time.perf_counter() - began, count


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", action="store_true", help="tar shards instead of parquet tables")
    parser.add_argument("--buffer", type=int, default=200, help="--shuffle_buffer")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder / "set", args.shards)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder / "hub", folder / "set", theirs), daemon=True
        )
        server.start()
        os.environ |= {"HF_ENDPOINT": ours.recv(), "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        try:
            measure(folder, args.buffer, ours)
        finally:
            ours.send("stop")
            server.join()


def measure(folder, buffer, pipe):
    from training_utils.cli.options import DataOptions
    from training_utils.data import opening
    from training_utils.data.plan import BatchPlan
    from training_utils.data.streaming import chunks, source

    def sent():
        pipe.send("sent")
        return pipe.recv()

    options = DataOptions(dataset_name=NAME, shuffle_buffer=buffer, cache_dir=str(folder / "cache"))
    chunks.CHUNK_BYTES = 2**21
    most = 0

    def measure_chunks():
        nonlocal most
        sizes = [path.stat().st_size for path in rows.source.spool.folder.glob("*.arrow")]
        most = max(most, sum(sizes))

    began = time.perf_counter()
    rows = opening.load_dataset(options)
    opened, walked = time.perf_counter() - began, sent()
    began = time.perf_counter()
    opening.load_dataset(options)
    again, before = time.perf_counter() - began, sent()
    source.IDLE_STEPS = 0
    first, seconds, count = read(BatchPlan(len(rows), 1, 16, stream=rows), rows, measure_chunks)
    total = rows.source.total_bytes()
    plain = opening.load_dataset(DataOptions(folder=folder / "set", cache_dir=str(folder / "cache")))
    _, local, _ = read(BatchPlan(len(plain), 1, 16), plain)
    print(
        f"images            {len(rows):,}, {total / 1e6:.0f} MB, in {len(rows.source.chunks)} chunks\n"
        f"first start         {opened:.2f} s, which downloads {walked / 1e6:.1f} MB\n"
        f"later starts        {again:.2f} s, {(before - walked) / 1e6:.1f} MB\n"
        f"first batch of 16   {first:.2f} s after it\n"
        f"an epoch downloads  {(sent() - before) / total:.2f} of the dataset\n"
        f"on the disk         {most / 1e6:.0f} MB at most, {most / total:.2f} of it; "
        f"{rows.source.peak_bytes() / 1e6:.0f} MB were announced\n"
        f"images a second   {count / seconds:.0f}, and {count / local:.0f} from a local copy without --streaming"
    )


if __name__ == "__main__":
    main()
