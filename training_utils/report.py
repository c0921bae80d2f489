"""Where the report page was: the old command still writes it. It is `python -m tools.report OUTPUT_DIR` now."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tools.report", run_name="__main__", alter_sys=True)
