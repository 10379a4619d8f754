"""Which backend shows bus locks best: the choice on each kind of host, and that it opens what it says."""

from __future__ import annotations

import pytest

from orchestra.backend.picking import Pick, Seen, open_best, pick
from orchestra.errors import BackendUnavailable

NO_KVM = "/dev/kvm does not exist: load the module: or not"
NO_UNICORN = "backend='emulated': unicorn is not installed: `pip install 'orchestra-kvm[emulated]'`"
INSTALL = "pip install 'orchestra-kvm[emulated]'"


@pytest.mark.parametrize(
    ("seen", "picked"),
    [
        (Seen(None, True, None), Pick("kvm", "kvm: /dev/kvm opens, and this host's KVM reports bus locks")),
        (Seen(None, True, NO_UNICORN), Pick("kvm", "kvm: /dev/kvm opens, and this host's KVM reports bus locks")),
        (
            Seen(None, False, None),
            Pick("emulated", "emulated: /dev/kvm opens, but this host's KVM reports no bus locks"),
        ),
        (Seen(NO_KVM, False, None), Pick("emulated", "emulated: /dev/kvm does not exist")),
        (
            Seen(None, False, NO_UNICORN),
            Pick("kvm", "kvm: /dev/kvm opens; it reports no bus locks here, but unicorn is not installed", INSTALL),
        ),
        (
            Seen(NO_KVM, False, NO_UNICORN),
            Pick(None, "no guest can run here: /dev/kvm does not exist; and unicorn is not installed", INSTALL),
        ),
    ],
)
def test_the_best_one_is_picked_with_its_reason_and_the_command_that_would_better_it(seen, picked):
    assert pick(seen) == picked


def test_what_was_picked_is_open_and_says_why(nothing_left):
    try:
        backend, picked = open_best()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert (backend.name, backend.why) == (picked.name, picked.why)
    backend.close()  # and whatever else was opened to look is closed: nothing_left
