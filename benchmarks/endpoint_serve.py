"""`pomarium serve` that takes --worker-cls, too, for engines that compute nothing: endpoint_serve.py serve ..."""

import sys

from pomarium.cluster.cli.main import main
from pomarium.cluster.replica import engine_options

if __name__ == "__main__":
    del engine_options.OURS["worker_cls"]
    sys.exit(main(sys.argv[1:]))
