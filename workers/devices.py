"""Where the tensors of a step live."""


def pick_device(wanted: str) -> str:
    """Resolve "auto" to the GPU when there is one."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
