"""`ray job submit -- python -m pomarium.cluster.batch IN OUT --model M`: as `pomarium batch run`."""

import sys

from pomarium.cluster.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["batch", "run", *sys.argv[1:]]))
