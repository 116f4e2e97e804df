"""The attack suite: its payloads are whole, its checks find what they look for, and a selection of it is stopped here."""

import os
from pathlib import Path

import pytest
from vlpost.rewards import attack as attack_module
from vlpost.rewards.attack import KINDS, Attack, AttackOutcome, AttackSuiteError, attack_table, is_stopped, load_attacks, run_attacks
from vlpost.rewards.execution import SandboxError

QUICK = ("honest_program", "wrong_function", "kill_the_judge", "tcp_to_a_local_server", "always_equal_int", "token_in_the_home_folder")


def outcome(**changes):
    fields = {"backend": "landlock", "user": "current", "name": "x", "kind": 1, "verdict": "wrong", "seconds": 0.1, "faults": ()}
    return AttackOutcome(**{**fields, **changes})


def test_every_kind_of_attack_has_programs_and_none_may_be_paid():
    attacks = load_attacks()
    assert {attack.kind for attack in attacks} == set(KINDS) == set(range(21))
    assert len([attack for attack in attacks if attack.kind]) >= 60
    assert all("accepted" not in attack.verdicts for attack in attacks if attack.kind)
    assert all("internal_error" not in attack.verdicts for attack in attacks)
    assert sum(attack.verdicts == ("accepted",) for attack in attacks) >= 4


def test_at_least_thirty_cheats_are_there():
    assert len([attack for attack in load_attacks() if attack.kind in range(11, 18)]) >= 30


def test_payloads_name_each_form_of_problem():
    assert {attack.form for attack in load_attacks()} == {"stdin", "calls", "asserts", "secret", "secret_calls", "secret_asserts"}


def test_an_unknown_field_or_verdict_of_a_payload_is_refused():
    row = {"name": "x", "kind": 1, "form": "stdin", "verdicts": ["wrong"], "program": "x"}
    assert Attack.model_validate(row).copies == 1
    for wrong in ({"verdicts": ["paid"]}, {"kind": 21}, {"form": "file"}, {"extra": 1}, {"verdicts": []}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Attack.model_validate({**row, **wrong})


def test_the_table_counts_each_kind_and_names_each_fault():
    table = attack_table(
        [
            outcome(),
            outcome(name="y", faults=("PAID", "a secret of the machine came out")),
            outcome(backend="bubblewrap"),
            outcome(kind=0, name="honest"),
        ]
    )
    lines = table.splitlines()
    assert lines[0].split("  ")[0] == "kind"
    assert [line.split()[-6:] for line in lines if line.startswith(" 1 ")] == [["1", "of", "2", "1", "of", "1"]]
    assert "FAULT y (kind 1, landlock, current user, verdict wrong): PAID" in lines
    assert lines[-1] == "4 runs, 3 stopped or judged as they should be, 1 not"


def test_nothing_run_is_not_stopped_and_one_fault_is_enough():
    assert not is_stopped([])
    assert is_stopped([outcome()])
    assert not is_stopped([outcome(), outcome(faults=("PAID",))])


def test_an_attack_that_nobody_knows_is_named():
    with pytest.raises(AttackSuiteError, match="no_such_attack"):
        run_attacks(backends=("auto",), users=("current",), names=("no_such_attack",))


def test_only_root_can_become_an_ordinary_user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(AttackSuiteError, match="only root"):
        run_attacks(backends=("auto",), users=("ordinary",), names=QUICK)


def test_a_selection_of_attacks_is_stopped():
    outcomes = run_attacks(backends=("auto",), users=("current",), names=QUICK)
    assert {outcome.name for outcome in outcomes} == {*QUICK, "nothing_left"}
    assert is_stopped(outcomes), attack_table(outcomes)


class TestTheChecks:
    """Each check must be able to fail: a sandbox that holds nothing back is caught by it."""

    @pytest.fixture
    def open_range(self, monkeypatch):
        # No program is started here: the "sandbox" does harmless versions of what an attack would have done.
        class Open:
            is_unsafe = False

            def __init__(self, config):
                self.act = lambda stdin: b""

            def __enter__(self):
                Open.latest = self
                return self

            def __exit__(self, *_):
                pass

            def open_session(self, program, *, limits):
                raise SandboxError("no session here")

            def run(self, program, *, stdin, limits):
                numbers = stdin.split()
                honest = b"%d\n" % (int(numbers[0]) + int(numbers[1])) if len(numbers) == 2 and "attack" not in program else b""
                if program == attack_module._WRONG:
                    honest = b"1000\n"
                output = self.act(stdin) if "attack" in program else honest
                return attack_module.Execution(status="finished", stdout=output, stderr=b"", exit_code=0, seconds=0.0, reason="")

        monkeypatch.setattr(attack_module, "Sandbox", Open)
        monkeypatch.setattr(attack_module, "LEFT_BEHIND_S", 0.0)
        with attack_module._Range("auto", "current") as attack_range:
            yield attack_range, Open.latest

    def faults(self, open_range, act, **changes):
        attack_range, sandbox = open_range
        sandbox.act = act
        row = {"name": "x", "kind": 1, "form": "stdin", "verdicts": ("wrong",), "program": "attack", **changes}
        return " | ".join(attack_range.attack(Attack.model_validate(row)).faults)

    def test_nothing_done_is_no_fault(self, open_range):
        assert self.faults(open_range, lambda stdin: b"no") == ""

    def test_a_paid_cheat_is_found(self, open_range):
        assert self.faults(open_range, lambda stdin: b"%d" % sum(map(int, stdin.split()))) == "PAID"

    def test_a_verdict_of_another_kind_is_found(self, open_range):
        assert "judged wrong, not time" in self.faults(open_range, lambda stdin: b"no", verdicts=("time",))

    def test_a_secret_in_the_output_is_found(self, open_range):
        assert "a secret of the machine came out" in self.faults(open_range, lambda stdin: open_range[0]._canary.encode())

    def test_an_aim_that_was_reached_is_found(self, open_range):
        assert "reached its aim" in self.faults(open_range, lambda stdin: open_range[0]._escaped.encode())

    def test_a_changed_checkpoint_is_found(self, open_range):
        def act(stdin):
            open_range[0]._checkpoint.write_text("gone")
            return b""

        assert "files outside were changed" in self.faults(open_range, act)

    def test_a_file_left_outside_is_found(self, open_range):
        left = Path("/tmp", open_range[0]._mark)
        try:
            assert "files are left outside" in self.faults(open_range, lambda stdin: left.write_text("x") and b"")
        finally:
            left.unlink()

    def test_a_process_left_is_found(self, open_range):
        import subprocess

        children = []

        def act(stdin):
            children.append(subprocess.Popen(["sleep", "60"]))
            return b""

        try:
            assert "processes are left" in self.faults(open_range, act)
        finally:
            for child in children:
                child.kill()
                child.wait()

    @pytest.mark.parametrize("name", ["TCP", "UDP", "UNIX"])
    def test_a_server_that_was_reached_is_found(self, open_range, name):
        import socket

        servers = open_range[0]._servers

        def act(stdin):
            if name == "UDP":
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
                    channel.sendto(b"x", ("127.0.0.1", servers.port))
            elif name == "TCP":
                socket.create_connection(("127.0.0.1", servers.port)).close()
            else:
                with socket.socket(socket.AF_UNIX) as channel:
                    channel.connect(servers.path)
            return b""

        assert f"a server outside was reached ({name})" in self.faults(open_range, act)

    def test_a_poisoned_neighbour_is_found(self, open_range):
        def act(stdin):
            open_range[1].run = lambda program, *, stdin, limits: attack_module.Execution(
                status="finished", stdout=b"poison", stderr=b"", exit_code=0, seconds=0.0, reason=""
            )
            return b""

        assert "the next program was judged wrong, not accepted" in self.faults(open_range, act)

    def test_no_attack_is_started_where_a_program_sees_its_judge(self, monkeypatch):
        class Leaky:
            is_unsafe = False

            def __init__(self, config):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def run(self, program, *, stdin, limits):
                path = program.partition('open("')[2].partition('"')[0]
                return attack_module.Execution(
                    status="finished", stdout=Path(path).read_bytes(), stderr=b"", exit_code=0, seconds=0.0, reason=""
                )

        monkeypatch.setattr(attack_module, "Sandbox", Leaky)
        with pytest.raises(AttackSuiteError, match="no attack is started"), attack_module._Range("auto", "current"):
            pass


def test_a_judge_that_dies_is_a_fault(monkeypatch):
    monkeypatch.setattr(attack_module.sys, "executable", "/bin/false")
    outcomes = run_attacks(backends=("auto",), users=("current",), names=QUICK)
    assert [one.name for one in outcomes] == ["the_judge"]
    assert "did not live to the end" in outcomes[0].faults[0]
