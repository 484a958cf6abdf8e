"""Every ``data=`` group trains to its end: no key that it leaves unread is taken for a lost wish.

``tests/data/test_config_use.py`` has the mixtures, and runs whose data is cached already.
"""

import json

import pytest

from scripts.prepare import main as prepare
from tests.data.hub_doubles import codeparrot, fineweb_edu
from train.errors import ROOT, ExitCode
from train.pretrain import cli

GROUPS = sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))
TEXTS = [f"text {i} " + " ".join(f"w{i}x{j}" for j in range(5 + i)) for i in range(40)]
PRESETS = {  # of data that the hub has by name; here from folders that look like it
    "fineweb_edu": ["fineweb_edu"],
    "codeparrot": ["codeparrot"],
    "web_and_code": ["fineweb_edu", "codeparrot"],
}
SMALL = "data.sources.embedded.packages=[asyncio]"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same documents in every kind of file, and in a token store."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    (folder / "set").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "set" / "train.parquet")
    fineweb_edu(folder / "fineweb_edu", TEXTS)
    codeparrot(folder / "codeparrot", TEXTS)
    code = prepare([
        "--out", f"{folder}/store", "--kind", "jsonl", "--path", f"{folder}/a.jsonl",
        "--vocab-size", "512", "--validation-bytes", "500", "--cache-dir", f"{folder}/cache",
    ])  # fmt: skip
    assert code == 0
    return folder


def asked(group, folder):
    """What a group needs on the command line."""
    if group in ("default", "bytes"):
        return ["data.sources.embedded.kind=embedded", SMALL]
    if group in PRESETS:
        return [f"data.sources.{name}.path={folder}/{name}" for name in PRESETS[group]]
    paths = {"text": "a.txt", "jsonl": "a.jsonl", "parquet": "set/train.parquet", "hub": "set"}
    args = {
        "text": ["data.sources.text.unit=line"],
        "mixture": [f"data.sources.store.path={folder}/store", SMALL],
        "store": [f"data.sources.store.path={folder}/store"],
        "recall": ["data.sources.pairs.documents=400"],
        "long_range": [
            "data.sources.packages.packages=[asyncio,json,email,http,xml]",
            "data.sources.synthetic.documents=40",
            "data.sources.synthetic.document_characters=4096",
        ],
    }.get(group, [])
    return args + [
        f"data.sources.{group}.path={folder}/{p}" for g, p in paths.items() if g == group
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_every_data_group_trains_to_its_end(files, tmp_path, group):
    code = cli([
        "model=v4_tiny", f"data={group}", *asked(group, files), f"run_dir={tmp_path}/run",
        f"data.cache_dir={tmp_path}/cache", "data.validation.bytes=500", "train.steps=2",
        "train.eval_tokens=256", "train.seq_len=64", "train.global_batch_tokens=256",
        "sample.tokens=0",
    ])  # fmt: skip
    assert code == ExitCode.finished
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    shares = {k: v for k, v in json.loads(lines[-1]).items() if k.startswith("share.")}
    if group == "mixture":
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["share.store"] == pytest.approx(0.7, abs=0.15)  # of 512 tokens, rows of 64
    elif group == "web_and_code":
        assert shares == pytest.approx({"share.fineweb_edu": 0.8, "share.codeparrot": 0.2}, abs=0.2)
    elif group == "long_range":
        assert shares == pytest.approx({"share.synthetic": 0.5, "share.packages": 0.5}, abs=0.15)
    else:
        assert shares == {}
