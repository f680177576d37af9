"""Load a teacher by its handle, whatever kind of model it is.

There is one kind so far, the SavedModel. Another kind is a subclass of `Teacher` in a file of its
own, which `load_teacher` recognises by the content of the teacher's folder.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers.interface import Teacher, TeacherInfo
from flsep.pipeline.teachers.model_folder import canonical_handle, resolve
from flsep.pipeline.teachers.savedmodel import SavedModelTeacher


def load_teacher(
    handle: str | os.PathLike[str],
    *,
    batch_windows: int = 128,
    num_threads: int | None = None,
    info: TeacherInfo | None = None,
) -> Teacher:
    """Load a teacher and find out how it cuts audio into windows.

    `handle` is an alias, address or folder, as for `resolve`. `info` is the result of an earlier
    load of the same teacher; its windows are then not searched again, and the caller compares the
    digests. TensorFlow uses `num_threads` threads in this process, by default one a core.

    Raises
    ------
    TeacherError
        If the teacher cannot be found, downloaded or loaded, or `num_threads` cannot take effect
        because TensorFlow runs already, or the model is no teacher: a function of float32 [sample]
        that returns finite float32 [window, dim], where the embedding of a window depends on that
        window alone.
    """
    return SavedModelTeacher.load(
        canonical_handle(handle),
        resolve(handle),
        batch_windows=batch_windows,
        num_threads=num_threads,
        info=info,
    )


# A worker runs many tasks with one teacher, and loading TensorFlow and the model is slow.
@lru_cache(maxsize=1)
def load_once(folder: Path, info: TeacherInfo, num_threads: int | None) -> Teacher:
    """Load the teacher that a run has found, once in a process; refuse it if it has changed."""
    teacher = load_teacher(str(folder), num_threads=num_threads, info=info)
    # The windows were taken from `info` without a search, which is right for the same files only.
    if teacher.info.digest != info.digest:
        raise TeacherError(
            f"{folder}: the teacher changed while the run was going on; start again with one "
            "teacher"
        )
    return teacher
