"""Where this process's Ray keeps its files."""

import ray._private.worker as worker


def session_folder() -> str:
    """Of this process's Ray, which takes it with it when it ends."""
    return str(worker._global_node.get_session_dir_path())
