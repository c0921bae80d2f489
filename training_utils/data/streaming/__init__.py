"""Datasets that do not fit on the disk: shards and tables stay where they are, on the hub or on a network disk.

What is fetched in one go is a chunk: consecutive row groups of a parquet table, or consecutive members of a tar shard.
How many samples each chunk has is known before the run, from the tables' footers and from one walk along the headers
of each shard; both are remembered for later runs. Nothing else is known: a caption or an image that cannot be used
shows when its turn comes.

The order of an epoch is a function of (seed, epoch), as for all other data, so a stream is interrupted, resumed and
divided among processes like them. It needs few chunks at any time, which lie in a folder on this disk, the spool.

`open_stream` in opening.py is where everything begins.
"""
