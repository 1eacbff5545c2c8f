"""Ends a server whose program was killed, and so could not do it."""

import subprocess

# It reads until the program's end of the pipe is gone. The server has then been asked to stop by
# the kernel, and gets the time that it is given for that.
_SCRIPT = """
read -r _
seconds=0
while [ $seconds -lt $3 ] && kill -0 -$1; do sleep 1; seconds=$((seconds + 1)); done
kill -9 -$1
rm -f "$2"*
"""


class Guard:
    """A small process that outlives this one, to clean up behind it.

    A stub may hang for ever when its server is gone: inside a call to it, with Python's lock held,
    where no thread of its own can notice.
    """

    def __init__(self, group: int, shm_prefix: str, patience_s: int) -> None:
        """Watch over a process group and its shared memory.

        Args:
            shm_prefix: a path; whatever begins with it is removed.
            patience_s: what the group may take to end by itself once this process has ended.
        """
        self._process = subprocess.Popen(  # noqa: S603  our own command line
            ["/bin/sh", "-c", _SCRIPT, "sh", str(group), shm_prefix, str(patience_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # What stops this process from a terminal is not to stop the guard.
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """There is nothing left to clean up."""
        self._process.kill()
        self._process.communicate()
