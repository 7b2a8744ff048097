"""What can go wrong beside mistakes of the user's and of ours: disks, memory, processes. In one line each."""

from __future__ import annotations

import errno

ADVICE = {
    errno.ENOSPC: "; what was written before is whole, and --resume goes on from the last checkpoint",
    errno.EDQUOT: "; what was written before is whole, and --resume goes on from the last checkpoint",
}
MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")

GONE = ("/gloo/", "Connection closed by peer", "NCCL communicator was aborted")


def trouble(error: BaseException) -> str | None:
    """One line about an error that is no bug of this program, None for one that is.

    Other classes than Python's are told by name and text: PyTorch need not be there.
    """
    text = last_line(error)
    if isinstance(error, OSError):
        return of_system(error, text)
    if isinstance(error, MemoryError):
        return f"out of memory{f' ({text})' if text else ''}; a smaller --batch-size or --input-size needs less"
    if not isinstance(error, RuntimeError):
        return None
    if "OutOfMemoryError" in (kind.__name__ for kind in type(error).__mro__) or any(m in text for m in MEMORY):
        return f"out of memory: {text[:200]}; a smaller --batch-size or --input-size needs less, --accumulate, too"
    if is_echo(error):
        return "another of the processes ended; the same command with --resume goes on"
    if text.startswith("DataLoader worker"):
        return (
            f"a process that reads images died ({text[:200]}); fewer --workers need less memory, and --resume goes on"
        )
    return None


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another process of torchrun is gone: of Gloo, NCCL, or their store."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return isinstance(error, RuntimeError) and ("DistError" in kinds or any(m in str(error) for m in GONE))


def of_system(error: OSError, text: str) -> str:
    """The file, and what the system says of it."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or text or type(error).__name__}{ADVICE.get(error.errno or 0, '')}"


def last_line(error: BaseException) -> str:
    """Of an error's text, where that of a worker process comes with its whole story; the first one of PyTorch's own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1].partition(": ")[2] or lines[-1] if lines[0].startswith("Caught ") else lines[0]
