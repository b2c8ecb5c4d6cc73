"""Push and pull with the real huggingface_hub client against a stand-in of the hub's API on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bank.banks import fill, make_bank, make_spec
from bank.hub_server import Hub, Misbehaviour, RepoState
from synthkit.bank import Bank, BankWriter, state
from synthkit.bank.errors import HubError
from synthkit.bank.hub.common import is_bank_file, parse_repo, redacted
from synthkit.bank.seal import signed
from synthkit.errors import BankError, OutputExistsError, RequirementError, StorageError, SynthkitError, UsageError

pytest.importorskip("huggingface_hub")
REPO = parse_repo("me/bank")
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    from huggingface_hub import constants, utils

    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its retries
    utils.disable_progress_bars()
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # as $HF_ENDPOINT would
        yield server


def push(hub, path, repo=REPO, **options):
    from synthkit.bank.hub.push import push

    return push(path, repo, endpoint=hub.url, token=TOKEN, **options)


def pull(hub, out, repo=REPO, **options):
    from synthkit.bank.hub.pull import pull

    return pull(repo, out, endpoint=hub.url, token=TOKEN, **options)


def contents(bank: Path) -> dict[str, bytes]:
    """What belongs to a bank: every file but the card (the Hub's has the seal in it) and the state."""
    return {
        p.relative_to(bank).as_posix(): p.read_bytes()
        for p in bank.rglob("*")
        if p.is_file() and p.name != "README.md" and p.relative_to(bank).parts[0] != "state"
    }


@pytest.fixture
def pushed(hub, tmp_path):
    make_bank(tmp_path / "bank")
    return push(hub, tmp_path / "bank")


def nothing_at(out: Path) -> bool:
    return not os.path.lexists(out)


# --- there and back ----------------------------------------------------------------------------------------------


def test_pushed_and_pulled_is_equal_byte_for_byte(hub, tmp_path, pushed):
    done = pull(hub, tmp_path / "out", expect=pushed.seal)
    assert contents(tmp_path / "out") == contents(tmp_path / "bank")
    assert done.commit == pushed.commit == hub.repos["me/bank"].branches["main"] and done.seal == pushed.seal
    assert done.left_out == [".gitattributes"] and Bank(tmp_path / "out").verify(deep=True).ok
    facts = json.loads((tmp_path / "out" / "state" / "pulled.json").read_text())
    assert facts["commit"] == pushed.commit and facts["repo"] == "me/bank" and facts["expected"] == pushed.seal
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert TOKEN not in (tmp_path / "out" / "state" / "pulled.json").read_text()


def test_generators_transform_and_label_sets_travel(hub, tmp_path):
    import numpy as np

    from synthkit.bank.labels.sets import LabelSpec
    from synthkit.bank.labels.writer import LabelWriter

    arrays = {"mean": np.zeros(3, np.float32)}
    writer = BankWriter.create(tmp_path / "bank", make_spec(transform=state.transform_entry("affine", arrays)))
    writer.write_transform(arrays)
    writer.write_generator(0, {"w": np.ones(4, np.float32)}, {"step": 1})
    fill(writer)
    bank = Bank(tmp_path / "bank")
    spec = LabelSpec(kind="images", bank=bank.record["uuid"], images=53, rows=53, num_classes=4, rows_per_shard=30)
    labels = LabelWriter.create(tmp_path / "bank", "other", spec)
    for index in range(spec.shards):
        labels.write_shard(index, {"logits": np.zeros((spec.shard_size(index), 4), np.float16)})
    unfinished = LabelWriter.create(tmp_path / "bank", "begun", spec)
    unfinished.write_shard(0, {"logits": np.zeros((30, 4), np.float16)})
    (tmp_path / "bank" / "state").mkdir(exist_ok=True)
    (tmp_path / "bank" / "state" / "lock").write_text("x")
    done = push(hub, tmp_path / "bank")
    assert done.skipped_sets == ["begun"]
    pull(hub, tmp_path / "out")
    assert contents(tmp_path / "out") == {
        name: data for name, data in contents(tmp_path / "bank").items() if not name.startswith("labels/begun")
    }
    assert Bank(tmp_path / "out").label_sets() == ["other"] and Bank(tmp_path / "out").verify(deep=True).ok
    pull(hub, tmp_path / "bare", labels=False)
    assert Bank(tmp_path / "bare").label_sets() == []


def test_old_banks_are_pushed_and_pulled(hub, tmp_path):
    shutil.copytree(Path(__file__).parent / "fixtures" / "schema1", tmp_path / "bank")
    push(hub, tmp_path / "bank")
    root = json.loads((tmp_path / "bank" / "manifest.json").read_text())["root"]
    done = pull(hub, tmp_path / "out", expect=root)
    assert done.seal is None and contents(tmp_path / "out") == contents(tmp_path / "bank")
    with pytest.raises(BankError, match="not the expected bank"):
        pull(hub, tmp_path / "other", expect="0" * 64)


def test_the_card_has_front_matter_and_the_seal(hub, pushed):
    card = hub.repos["me/bank"].files["README.md"].decode()
    assert card.startswith("---\n") and pushed.seal in card


def test_private_branch_and_message(hub, tmp_path):
    make_bank(tmp_path / "bank")
    done = push(hub, tmp_path / "bank", parse_repo("me/bank@v2"), private=True, message="first")
    repo = hub.repos["me/bank"]
    assert repo.private and repo.branches["v2"] == done.commit and "bank.json" not in repo.files
    with pytest.raises(HubError, match="no sealed bank"):
        pull(hub, tmp_path / "out")
    assert len(pull(hub, tmp_path / "out", parse_repo("hf:me/bank@v2")).bank) == 53


def test_a_repository_as_a_bank_spec_is_pulled_once_per_commit(hub, tmp_path, pushed, monkeypatch):
    from synthkit.bank.hub.common import local_bank

    monkeypatch.setenv("SYNTHKIT_HOME", str(tmp_path / "store"))
    assert local_bank(tmp_path / "bank") == tmp_path / "bank"
    place = local_bank("hf:me/bank")
    assert contents(place) == contents(tmp_path / "bank") and pushed.commit[:12] in place.name
    hub.requests.clear()
    assert local_bank("hf:me/bank") == place and [m for m, p, _ in hub.requests if "/resolve/" in p] == []
    hub.requests.clear()
    assert local_bank(f"hf:me/bank@{pushed.commit}") == place and hub.requests == []


# --- push --------------------------------------------------------------------------------------------------------


def test_a_second_push_uploads_nothing(hub, tmp_path, pushed):
    hub.requests.clear()
    again = push(hub, tmp_path / "bank")
    assert again.commit == pushed.commit and again.uploaded == 0
    assert hub.count("PUT", "/lfs/") == 0 and hub.count("POST", "/commit/") == 0


def test_a_push_that_was_cut_does_not_upload_twice(hub, tmp_path):
    make_bank(tmp_path / "bank")
    seen = []

    def hook(method, path):
        if method == "PUT":
            seen.append(path)
            if len(seen) > 4:
                raise Misbehaviour(status=403)

    hub.hook = hook
    with pytest.raises(HubError):
        push(hub, tmp_path / "bank")
    assert "bank.json" not in hub.repos["me/bank"].files  # nothing shows before everything is there
    hub.hook = lambda method, path: None
    stored = len(hub.lfs)
    assert stored >= 4
    hub.requests.clear()
    push(hub, tmp_path / "bank")
    assert hub.count("PUT", "/lfs/") == 6 - stored
    pull(hub, tmp_path / "out")


def test_unfinished_unsealed_and_damaged_banks_are_refused(hub, tmp_path):
    writer = BankWriter.create(tmp_path / "begun", make_spec())
    fill(writer, [0, 1])
    with pytest.raises(BankError, match="4 of 6 shards are missing"):
        push(hub, tmp_path / "begun")
    make_bank(tmp_path / "bank")
    (tmp_path / "bank" / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(BankError, match="not sealed"):
        push(hub, tmp_path / "bank")
    (tmp_path / "manifest.json").rename(tmp_path / "bank" / "manifest.json")
    shard = tmp_path / "bank" / "shards" / "00003.h5"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BankError, match="shard 3"):
        push(hub, tmp_path / "bank")
    assert hub.repos == {}


def test_another_bank_is_not_replaced_by_accident(hub, tmp_path, pushed):
    make_bank(tmp_path / "other", seed=8, images=33)
    with pytest.raises(HubError, match="holds another bank.*--replace"):
        push(hub, tmp_path / "other")
    done = push(hub, tmp_path / "other", replace=True)
    assert "shards/00005.h5" in done.removed and "shards/00005.h5" not in hub.repos["me/bank"].files
    pull(hub, tmp_path / "new", expect=done.seal)
    assert len(pull(hub, tmp_path / "old", parse_repo(f"me/bank@{pushed.commit}"), expect=pushed.seal).bank) == 53


def test_large_banks_take_several_commits_the_manifest_last(hub, tmp_path, monkeypatch, pushed):
    monkeypatch.setattr("synthkit.bank.hub.push.COMMIT_FILES", 5)
    make_bank(tmp_path / "other", seed=8)
    done = push(hub, tmp_path / "other", replace=True)
    commits = list(hub.repos["me/bank"].commits.values())
    new = commits[2:]
    assert len(new) == 3 and all("manifest.json" not in files for files in new[:-1])
    assert "manifest.json" in new[-1] and pull(hub, tmp_path / "out").seal == done.seal


def test_what_the_hub_did_not_store_is_noticed(hub, tmp_path, monkeypatch):
    make_bank(tmp_path / "bank")
    honest = RepoState.commit

    def dishonest(self, branch, files):
        return honest(self, branch, {k: v for k, v in files.items() if k != "shards/00002.json"})

    monkeypatch.setattr(RepoState, "commit", dishonest)
    with pytest.raises(HubError, match="shards/00002.json was not stored"):
        push(hub, tmp_path / "bank")


def test_a_commit_of_somebody_else_meanwhile(hub, tmp_path):
    make_bank(tmp_path / "bank")
    push(hub, tmp_path / "bank")
    (tmp_path / "bank" / "README.md").write_text("x")
    repo = hub.repos["me/bank"]
    repo.commit("main", {k: v for k, v in repo.files.items() if k != "shards/00001.h5"})

    def hook(method, path):
        if "/commit/" in path:
            hub.hook = lambda method, path: None
            repo.commit("main", {**repo.files, "note.txt": b"mine"})

    hub.hook = hook
    with pytest.raises(HubError, match="changed by somebody else"):
        push(hub, tmp_path / "bank")
    assert repo.files["note.txt"] == b"mine"


# --- pull: resumable ---------------------------------------------------------------------------------------------


def test_a_pull_that_was_cut_goes_on_without_fetching_again(hub, tmp_path, pushed, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # 10 MB: what is lost at most
    size = (tmp_path / "bank" / "shards" / "00003.h5").stat().st_size

    def hook(method, path):
        if path.endswith("shards/00003.h5"):
            raise Misbehaviour(cut=1000) if hub.count("GET", "00003.h5") == 1 else Misbehaviour(status=500)

    hub.hook = hook
    with pytest.raises(HubError):
        pull(hub, tmp_path / "out")
    assert nothing_at(tmp_path / "out")
    hub.hook = lambda method, path: None
    before = [p for m, p, r in hub.requests if m == "GET" and "/resolve/" in p]
    hub.requests.clear()
    done = pull(hub, tmp_path / "out")
    again = [(p, r) for m, p, r in hub.requests if m == "GET" and "/resolve/" in p]
    assert [r for p, r in again if p.endswith("00003.h5")] == ["bytes=1000-"]
    whole = {p for p in before if not p.endswith("00003.h5")}
    assert not whole & {p for p, _ in again} or len(whole & {p for p, _ in again}) <= 3  # at most those in flight
    assert done.fetched < done.bytes and done.fetched >= size - 1000
    assert contents(tmp_path / "out") == contents(tmp_path / "bank")


def test_a_killed_pull_goes_on(hub, tmp_path, pushed):
    """kill -9 of the command itself, in a process of its own."""
    gate = tmp_path / "gate"

    def hook(method, path):
        if path.endswith("00004.h5") and method == "GET":
            gate.touch()
            end = time.monotonic() + 20
            while gate.exists() and time.monotonic() < end:
                os.sched_yield()

    hub.hook = hook
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
           "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": root}  # fmt: skip
    command = [sys.executable, "-m", "synthkit", "bank", "pull", "me/bank", "--out", str(tmp_path / "out")]
    first = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while (hub.count("GET", ".h5") < 6 or not gate.exists()) and time.monotonic() < deadline:
        os.sched_yield()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert gate.exists() and nothing_at(tmp_path / "out")
    gate.unlink()
    hub.hook = lambda method, path: None
    had = {p.name for p in (tmp_path / ".out.pull" / "bank").rglob("*") if p.is_file()}
    assert "manifest.json" in had
    hub.requests.clear()
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pulled 53 images" in done.stdout and pushed.seal in done.stdout and TOKEN not in done.stdout + done.stderr
    fetched = {p.rpartition("/")[2] for m, p, _ in hub.requests if m == "GET" and "/resolve/" in p}
    assert not fetched & had and "00004.h5" in fetched
    assert contents(tmp_path / "out") == contents(tmp_path / "bank")


def test_two_pulls_into_one_place(hub, tmp_path, pushed):
    from synthkit.bank.errors import BankBusyError

    def hook(method, path):
        if path.endswith("bank.json") and method == "GET":
            hub.hook = lambda method, path: None
            with pytest.raises(BankBusyError):
                pull(hub, tmp_path / "out")

    hub.hook = hook
    assert len(pull(hub, tmp_path / "out").bank) == 53


def test_leftovers_of_another_bank_do_not_get_in(hub, tmp_path, pushed):
    make_bank(tmp_path / "other", seed=8, images=73)
    push(hub, tmp_path / "other", parse_repo("me/other"))
    hub.served["shards/00006.h5"] = b"x"
    with pytest.raises(SynthkitError):
        pull(hub, tmp_path / "out", parse_repo("me/other"))
    hub.served.clear()
    pull(hub, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "bank")


# --- pull: pinned ------------------------------------------------------------------------------------------------


def test_a_branch_that_moves_during_the_pull_changes_nothing(hub, tmp_path, pushed):
    make_bank(tmp_path / "other", seed=8)
    repo = hub.repos["me/bank"]

    def hook(method, path):
        if "/tree/" in path:
            hub.hook = lambda method, path: None
            repo.commit("main", {**contents(tmp_path / "other")})

    hub.hook = hook
    done = pull(hub, tmp_path / "out")
    assert done.commit == pushed.commit != repo.branches["main"]
    assert contents(tmp_path / "out") == contents(tmp_path / "bank")
    assert all(pushed.commit in p for m, p, _ in hub.requests if "/resolve/" in p)


# --- pull: hostile -----------------------------------------------------------------------------------------------


def served_bank(hub, tmp_path, change):
    """The repository holds the files of a bank after `change(files)`."""
    make_bank(tmp_path / "bank")
    files = contents(tmp_path / "bank")
    change(files)
    hub.repos["me/bank"] = RepoState()
    hub.repos["me/bank"].commit("main", files)


def resealed(files):
    """A liar's manifest: its own hash fits."""
    files["manifest.json"] = json.dumps(signed(json.loads(files["manifest.json"]))).encode()


def swap(files):
    files["shards/00001.h5"], files["shards/00002.h5"] = files["shards/00002.h5"], files["shards/00001.h5"]


def flip(name):
    def change(files):
        data = bytearray(files[name])
        data[len(data) // 2] ^= 4
        files[name] = bytes(data)

    return change


def rows(change):
    def changed(files):
        manifest = json.loads(files["manifest.json"])
        change(manifest)
        files["manifest.json"] = json.dumps(manifest).encode()
        resealed(files)

    return changed


@pytest.mark.parametrize("change", [
    swap, flip("shards/00000.h5"), flip("shards/00000.json"), flip("bank.json"), flip("manifest.json"),
    lambda files: files.pop("shards/00004.h5"), lambda files: files.pop("shards/00004.json"),
    lambda files: files.update({"shards/00001.h5": b""}), lambda files: files.update({"manifest.json": b"[]"}),
    lambda files: files.update({"manifest.json": b" " * (17 << 20)}),
    lambda files: files.update({"shards/00000.json": b" " * (17 << 20)}),
    rows(lambda m: m["shards"][0].update(bytes=10**15)), rows(lambda m: m["shards"][0].update(bytes=-1)),
    rows(lambda m: m["shards"][0].update(shard="../../x")), rows(lambda m: m["shards"].append(m["shards"][0])),
    rows(lambda m: m["shards"][0].update(sha256="no")), rows(lambda m: m.update(uuid="0" * 8)),
    rows(lambda m: m.update(root="0" * 64)), rows(lambda m: m.update(shards=[])),
    rows(lambda m: m.update(transform={"index": 0, "bytes": 5, "sha256": "0" * 64, "record_sha256": "0" * 64})),
], ids=lambda change: None)  # fmt: skip
def test_altered_repositories_are_refused_and_nothing_appears(hub, tmp_path, change):
    served_bank(hub, tmp_path, change)
    with pytest.raises(BankError):
        pull(hub, tmp_path / "out")
    assert nothing_at(tmp_path / "out")


def test_a_server_that_sends_other_bytes_than_it_lists(hub, tmp_path, pushed):
    shard = bytearray(hub.repos["me/bank"].files["shards/00001.h5"])
    shard[100] ^= 1
    hub.served["shards/00001.h5"] = bytes(shard)
    with pytest.raises(BankError, match="sha256"):
        pull(hub, tmp_path / "out")
    assert nothing_at(tmp_path / "out")
    hub.served.clear()
    assert len(pull(hub, tmp_path / "out").bank) == 53  # the wrong bytes were not kept


def test_a_server_that_sends_more_than_it_announced(hub, tmp_path, pushed):
    def hook(method, path):
        if path.endswith("00001.h5"):
            raise Misbehaviour(extra=b"x" * 5_000_000)

    hub.hook = hook
    with pytest.raises(HubError, match="more of shards/00001.h5"):
        pull(hub, tmp_path / "out")
    assert nothing_at(tmp_path / "out")
    kept = sum(p.stat().st_size for p in (tmp_path / ".out.pull").rglob("*") if p.is_file())
    assert kept < 100_000


def test_foreign_names_are_never_asked_for(hub, tmp_path, pushed):
    strangers = {
        "../evil.txt": b"x", "/etc/passwd": b"x", "shards/../../x.h5": b"x", "shards/00001.h5.tmp-a-1": b"x",
        "a.py": b"x",
        "state/lock": b"x", "labels/../x/00000.h5": b"x", "shards/\u0661\u0661\u0661\u0661\u0661.h5": b"x",
        "quarantine/x": b"x", "generators/00007.pkl": b"x", "C:\\x.h5": b"x",
    }  # fmt: skip
    repo = hub.repos["me/bank"]
    repo.commit("main", {**repo.files, **strangers})
    hub.requests.clear()
    done = pull(hub, tmp_path / "out")
    assert set(strangers) <= set(done.left_out) and contents(tmp_path / "out") == contents(tmp_path / "bank")
    asked = {p.partition("/resolve/")[2].partition("/")[2] for m, p, _ in hub.requests if "/resolve/" in p}
    assert asked == set(contents(tmp_path / "bank")) | {"README.md"}


def test_strange_files_of_a_bank_that_no_manifest_names(hub, tmp_path, pushed):
    repo = hub.repos["me/bank"]
    repo.commit("main", {**repo.files, "shards/00777.h5": b"x", "generators/00003.json": b"{}"})
    pull(hub, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "bank")


def test_the_expected_seal(hub, tmp_path, pushed):
    with pytest.raises(BankError, match="is not the expected bank"):
        pull(hub, tmp_path / "out", expect="a" * 64)
    root = json.loads((tmp_path / "bank" / "manifest.json").read_text())["root"]
    with pytest.raises(BankError, match="root hash"):
        pull(hub, tmp_path / "out", expect=root)
    with pytest.raises(UsageError, match="64 hex digits"):
        pull(hub, tmp_path / "out", expect="abc")
    assert nothing_at(tmp_path / "out")
    assert hub.count("GET", ".h5") == 0  # it is known before a shard is fetched


# --- pull: refusals ----------------------------------------------------------------------------------------------


def test_no_repository_no_revision_gated_and_unauthorised(hub, tmp_path, pushed):
    cases = [("me/none", "no dataset repository"), ("me/bank@nope", "no such revision")]
    for spec, say in cases:
        with pytest.raises(HubError, match=say):
            pull(hub, tmp_path / "out", parse_repo(spec))
    hub.repos["me/bank"].gated = True
    with pytest.raises(HubError, match="gated"):
        pull(hub, tmp_path / "out")
    hub.repos["me/bank"].gated = False
    hub.token = "hf_another"
    with pytest.raises(HubError, match="hf auth login") as caught:
        pull(hub, tmp_path / "out")
    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(HubError) as caught:
        push(hub, tmp_path / "bank")
    assert TOKEN not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank"]


def test_no_network(tmp_path, hub):
    from synthkit.bank.hub.pull import pull

    with pytest.raises(HubError, match="run the command again"):
        pull(REPO, tmp_path / "out", endpoint="http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


def test_offline(tmp_path, hub, monkeypatch):
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset = getattr(utils._http, "reset_sessions", None)  # before 1.0 a session is made online or offline
    if reset:
        reset()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull(hub, tmp_path / "out")
    if reset:
        reset()


def test_an_existing_target_is_never_touched(hub, tmp_path, pushed):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        pull(hub, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    pull(hub, tmp_path / "empty")


def test_no_room(hub, tmp_path, pushed, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("synthkit.bank.hub.fetch.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="MB are free"):
        pull(hub, tmp_path / "out")
    assert hub.count("GET", ".h5") == 0


def test_without_the_library(tmp_path, monkeypatch):
    from synthkit.bank.hub.common import client

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequirementError, match=r"synthkit\[hub\]"):
        client()


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, name, revision", [
    ("me/bank", "me/bank", None), ("bank", "bank", None), ("me/bank@v1.0", "me/bank", "v1.0"),
    ("hf:me/bank@refs/pr/3", "me/bank", "refs/pr/3"), ("hf://datasets/me/bank", "me/bank", None),
])  # fmt: skip
def test_repositories(spec, name, revision):
    repo = parse_repo(spec)
    assert (repo.name, repo.revision) == (name, revision)


@pytest.mark.parametrize(
    "spec", ["", "a/b/c", "../x", "me/", "me/b b", "me/bank@", "me/bank@../x", "me/bank@a b", "x--y"]
)
def test_no_repositories(spec):
    with pytest.raises(UsageError):
        parse_repo(spec)


def test_the_revision_is_given_once():
    assert parse_repo("me/bank", "v1").revision == "v1"
    with pytest.raises(UsageError, match="twice"):
        parse_repo("me/bank@v1", "v2")


def test_messages_carry_no_token():
    text = redacted("401 for https://x.org/a?sig=abc&t=1 with Bearer hf_AbCdEf123456 and hf_QwErTy987654")
    assert "AbCdEf" not in text and "QwErTy" not in text and "sig=abc" not in text


def test_names_of_bank_files():
    for name in ("bank.json", "manifest.json", "README.md", "shards/00000.h5", "shards/123456.json",
                 "generators/00001.safetensors", "transform/00000.json", "labels/r34-views/labels.json"):  # fmt: skip
        assert is_bank_file(name), name
    for name in ("shards/0.h5", "shards/00000.h5\n", "Bank.json", "labels/A/labels.json", "labels/a/b/00000.h5",
                 "transform/00000.pkl", "bank.json/", "./bank.json", "shards//00000.h5",
                 "state/00000.json"):  # fmt: skip
        assert not is_bank_file(name), name
