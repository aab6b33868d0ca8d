"""The program of a site's process, forked from a warm process: runs a test's program and stores its result.

The global TASK is a dict of program, folder, log, out, kit and values. The program finds `VALUES` and `KIT`, and leaves
its result in `RESULT`.
"""

import atexit
import os
import pickle
import runpy
import sys
import traceback

task = globals()["TASK"]
with open(task["log"], "w") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
os.chdir(task["folder"])
os.environ.pop("FL_ADAPTERS_KIT", None)
if task["kit"]:
    os.environ["FL_ADAPTERS_KIT"] = task["kit"]
done = {"result": None, "error": None}
try:
    left = runpy.run_path(task["program"], {"VALUES": task["values"], "KIT": task["kit"]}, run_name="__main__")
    done["result"] = left.get("RESULT")
except BaseException as error:
    traceback.print_exc()
    done["error"] = f"{type(error).__name__}: {error}"
atexit._run_exitfuncs()  # a forked process skips what ends an ordinary script
with open(task["out"], "wb") as out:
    pickle.dump(done, out)
if done["error"]:
    sys.exit(1)
