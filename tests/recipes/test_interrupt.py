import os
import signal

import pytest
from vlpost.model.layout import Ranks
from vlpost.recipes.interrupt import Interrupt, StopRequestedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Puts the handlers back, whatever a test does to them."""
    outside = {number: signal.getsignal(number) for number in SIGNALS}
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # a background job ignores SIGINT
    for number, handler in before.items():
        signal.signal(number, handler)
    yield before
    for number, handler in outside.items():
        signal.signal(number, handler)


def test_without_a_signal_check_does_nothing():
    with Interrupt(Ranks()) as interrupt:
        interrupt.check()
        assert not interrupt.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_until_the_next_check(number):
    with Interrupt(Ranks()) as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.requested
        for _ in range(2):
            with pytest.raises(StopRequestedError):
                interrupt.check()


def test_the_second_ctrl_c_acts_at_once():
    with Interrupt(Ranks()) as interrupt:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.requested


def test_a_second_signal_of_the_other_kind_acts_at_once_too(handlers):
    with Interrupt(Ranks()):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


@pytest.mark.parametrize("signals", [0, 1])
def test_the_handlers_are_put_back_at_the_end(handlers, signals):
    calls = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    own = signal.getsignal(signal.SIGINT)
    with Interrupt(Ranks()):
        assert signal.getsignal(signal.SIGINT) != own
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)
        assert calls == []
    assert signal.getsignal(signal.SIGINT) is own
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


def test_the_handlers_are_put_back_after_an_error(handlers):
    with pytest.raises(OSError, match="disk full"), Interrupt(Ranks()):
        raise OSError("disk full")
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
