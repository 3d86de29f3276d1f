"""Python reads this at its start where this folder is on the path: faults in a command's child."""

import os

if "SAFEGENE_FAULT" in os.environ:
    import armed

    armed.from_environment()
