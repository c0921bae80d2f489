"""One page about a run, or about several side by side: curves, images, settings, what lies in its folder.

python -m tools.report OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE]

The page needs nothing but itself: no network, no other file. Without its script only the readouts of the charts are
missing. It is written from what the folder holds, at any time: while a run is under way, after it, or after a kill.
Imports no torch. Captions, paths and settings are foreign text, and all that is written is escaped.
"""
