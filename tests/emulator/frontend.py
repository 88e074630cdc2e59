"""Would Metal's compiler take this text? clang's front end says, with address spaces as types' properties.

It finds what C++ and the address spaces forbid, narrowing conversions, shadowed names, and mixed argument types, about
which Metal is as strict as msl/maths.h. Rules that only Metal's compiler has stay unchecked.
"""

from emulator.build import messages
from emulator.translate import MetalText, checkable


class NotMetalError(RuntimeError):
    """The text is not Metal."""


def check(metal: MetalText) -> None:
    """Look at the text.

    Raises:
        NotMetalError: with the front end's errors and warnings.
    """
    said = messages(checkable(metal))
    if said:
        raise NotMetalError(said)
