"""Child processes that do not outlive their parent."""

import os
import threading
import time


def exit_with_parent(pid: int) -> None:
    """Ends this process within half a second after process ``pid`` stops being its parent.

    The kernel's parent-death signal cannot do this: it comes when the parent's THREAD that started the child ends.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
