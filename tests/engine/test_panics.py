"""A panic of a Rust library is an error of its caller; what else is no Exception passes."""

import pytest

from gptoss.engine.panics import PANIC_MODULE, panics_become

PanicException = type("PanicException", (BaseException,), {"__module__": PANIC_MODULE})


def test_a_panic_becomes_the_error_that_was_named() -> None:
    with pytest.raises(ValueError, match="named"), panics_become(ValueError("named")):
        raise PanicException("end byte index 100 is not a char boundary")


@pytest.mark.parametrize("other", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_everything_else_passes(other: type[BaseException]) -> None:
    with pytest.raises(other), panics_become(ValueError("named")):
        raise other
