"""Runs scripts in forks of a process that has already imported a framework: `python warm_process.py MODULE...`.

Each line on stdin is a request in JSON. {"script", "kit", "log"} starts a script and answers with its process id.
{"status": pid} answers with its exit status, or null while it runs.
"""

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback


def run(script: str, kit: str, log: str) -> None:
    """Do what `python script` would do, in the forked process."""
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(os.path.dirname(log))
    os.environ["FL_ADAPTERS_KIT"] = kit
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        atexit._run_exitfuncs()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    request = json.loads(line)
    if "status" in request:
        pid, status = os.waitpid(request["status"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if not answer:
            run(**request)
    print(json.dumps(answer), flush=True)
