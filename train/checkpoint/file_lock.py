"""Advisory locks on files (flock): the kernel frees them when their process ends in any way."""

from __future__ import annotations

import errno
import fcntl

_NO_LOCKS_HERE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}


def take(descriptor: int, shared: bool = False) -> bool | None:
    """Lock an open file without waiting.

    Args:
        descriptor: of the file. Some network file systems want it open for writing, unless
            ``shared``.
        shared: others may share the lock.

    Returns:
        Whether it is locked now; None: this file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return None
        raise
    return True
