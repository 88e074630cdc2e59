"""A process that runs one script after another, so that several tests share one import of vLLM and one embedded Ray.

    line on stdin: {"body": str, "environment": {...}} --exec--> what it prints, then a line with END and the status

Engines, Ray and loggers belong to a process, so they stay out of the test's own; a script's variables are its own.
"""

import json
import os
import sys
import traceback

END = "--- end of script:"


def serve() -> None:
    """Run scripts until stdin closes."""
    base = dict(os.environ)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["environment"])
        status = 0
        try:
            exec(compile(request["body"], "script", "exec"), {"__name__": "script"})
        except BaseException:  # noqa: BLE001 - reported as the script's own exit status
            traceback.print_exc()
            status = 1
        for name in request["environment"]:
            del os.environ[name]
            if name in base:
                os.environ[name] = base[name]
        sys.stderr.flush()
        print(f"\n{END} {status}", flush=True)


if __name__ == "__main__":
    serve()
