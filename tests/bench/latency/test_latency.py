"""migician-bench latency: the pictures, the counts of work, the statistics, the engines' processes, the command."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner
from PIL import Image
from quantized import make_quantized

from migician.bench.cli import command
from migician.bench.engines import PHASES, Engine, Times
from migician.bench.latency import measure as measure_module
from migician.bench.latency.backend import Backend
from migician.bench.latency.energy import find_meter, rapl_zones, tegra_watts
from migician.bench.latency.llama_peer import LlamaCpp, read_log
from migician.bench.latency.measure import percentiles, ratios, summarize
from migician.bench.latency.openvino_peer import split
from migician.bench.latency.peers import Setting, choose_peers
from migician.bench.latency.work import decode_work, floor_ms, prefill_work, vision_work
from migician.bench.latency.workload import PROMPT, Case, pictures
from migician.runtime.backends import BACKENDS, native
from migician.runtime.backends.native import Pool, Session, measure_ceilings
from migician.runtime.errors import MigicianError, UnsupportedError
from migician.runtime.files.open import open_checkpoint
from migician.runtime.model import load

SMALL = ["--size", "56x84", "--new-tokens", "3", "--repeat", "2", "--threads", "1"]


# ------------------------------------------------------------------------------------------------- pictures, statistics


def test_pictures_repeat_themselves_and_differ_between_repeats() -> None:
    case = Case(2, 120, 90, 1)
    first, again, other = pictures(case, 0), pictures(case, 0), pictures(case, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, other, strict=True):
        assert a.shape == (90, 120, 3)
        changed = np.argwhere((a != b).any(-1))
        assert len(changed) > 1 and changed.max() < 28
    assert not np.array_equal(first[0], first[1])


def test_percentiles_and_what_an_engine_cannot_tell() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0])["p50"] == 2.5
    assert percentiles([float(n) for n in range(101)]) | {"values": None} == {
        "p50": 50.0, "p90": 90.0, "p99": 99.0, "values": None,
    }  # fmt: skip
    run = {"preprocess_ms": None, "vision_ms": 10.0, "prefill_ms": 20.0, "decode_ms": 30.0, "total_ms": 60.0,
           "steps_ms": [1.0, 2.0, 3.0], "prompt_tokens": 9, "new_tokens": 4,
           "peak_rss_mb": 5.0, "energy_j": 2.0}  # fmt: skip
    found = summarize([run, run | {"decode_ms": 50.0, "peak_rss_mb": 7.0, "energy_j": 4.0}])
    assert found["preprocess_ms"] is None
    assert found["decode_ms"]["p50"] == 40.0
    assert found["tokens_per_s"] == 75.0  # three steps follow the first token
    assert found["peak_rss_mb"] == 7.0 and found["energy_j"] == 3.0
    assert found["step_ms"]["p50"] == 2.0


def test_a_ratio_over_one_says_that_ours_is_better() -> None:
    def entry(ms: float, rate: float, peak: float) -> dict[str, Any]:
        phases = {f"{p}_ms": {"p50": ms} for p in ("vision", "prefill", "decode", "total")}
        return {**phases, "preprocess_ms": None, "tokens_per_s": rate, "peak_rss_mb": peak}

    found = ratios(entry(10, 40, 100), entry(30, 10, 150))
    assert found == {
        "vision": 3.0,
        "prefill": 3.0,
        "decode": 3.0,
        "total": 3.0,
        "tokens_per_s": 4.0,
        "peak_rss_mb": 1.5,
    }


# --------------------------------------------------------------------------------------------------------- counted work


def test_the_work_is_that_of_the_geometry(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "m", hidden=128, layers=3, heads=4, kv_heads=2, inter=192, vocab=320, tied=False, v_dim=64, v_depth=2
    )
    with open_checkpoint(folder) as checkpoint:
        seen = vision_work(checkpoint, [24, 40])
        block = 64 * 3 * 64 + 64 * 64 + 2 * 64 * 256
        assert sum(seen.products.values()) == 2 * (64 * (1176 * 64 + 2 * block) + 16 * (256 * 256 + 256 * 128))
        assert seen.products["bf16"] == sum(seen.products.values())
        assert seen.attention == 2 * 4 * 64 * (24**2 + 40**2)

        layer = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 192
        read = prefill_work(checkpoint, 50)
        keys_and_values = 2 * 128 * 64
        last = 50 * keys_and_values + layer - keys_and_values
        assert sum(read.products.values()) == 2 * (50 * 2 * layer + last + 320 * 128)
        assert read.attention == 2 * 2 * 128 * (2 * 50 * 51 / 2 + 50)
        vectors = 3 * (128 + 64 + 64 + 128 + 128) + 128
        assert read.bytes == 2 * (3 * layer + 320 * 128 + vectors)  # the embedding table is not the head

        step = decode_work(checkpoint, 100)
        assert step.bytes == read.bytes + 3 * 2 * 100 * 64 * 2
        assert decode_work(checkpoint, 100, "fp32").bytes == read.bytes + 3 * 2 * 100 * 64 * 4
        assert step.attention == 2 * 2 * 3 * 128 * 100
        assert prefill_work(checkpoint, 50, "fp32").products["f32"] == sum(read.products.values())


def test_quantized_matrices_count_as_integers_and_by_their_stored_bytes(tiny: Path, tmp_path: Path) -> None:
    mig = make_quantized(tiny, tmp_path / "q.mig", keep=["model.layers.0.mlp.up_proj"])
    with open_checkpoint(tiny) as plain, open_checkpoint(mig) as small:
        before, after = prefill_work(plain, 10), prefill_work(small, 10)
        kept = 2 * 10 * 192 * 128
        assert after.products == {"int8": before.products["bf16"] - kept, "bf16": kept, "f32": 0}
        read = [t.nbytes for name, t in small.tensors.items() if not name.startswith("visual.")]
        assert after.bytes == sum(read) < before.bytes  # the embedding table is the head here
        assert prefill_work(small, 10, "fp32").products["int8"] == 0


def test_the_floor_is_computing_or_reading_whichever_is_longer(tiny: Path) -> None:
    ceilings = {"int8_ops": 4e9, "bf16_ops": 0.0, "f32_ops": 1e9, "read_bytes": 1e9}
    with open_checkpoint(tiny) as checkpoint:
        work = prefill_work(checkpoint, 400)
        assert floor_ms(work, ceilings) == pytest.approx(work.operations / 1e6)  # bf16 as f32
        fast = ceilings | {"bf16_ops": 2e9}
        assert floor_ms(work, fast) == pytest.approx(work.operations / 2e6)
        assert floor_ms(work, fast, "fp32") > floor_ms(work, fast)
        assert floor_ms(work, ceilings | {"read_bytes": 1.0}) == pytest.approx(1000 * work.bytes)


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(Pool(1), seconds=0.01)
    assert set(found) == {"read_bytes", "f32_ops", "int8_ops", "bf16_ops"}
    assert min(found["read_bytes"], found["f32_ops"], found["int8_ops"]) > 1e6
    with pytest.raises(MigicianError, match="seconds"):
        measure_ceilings(Pool(1), seconds=0)


# ----------------------------------------------------------------------------------------------------------- our engine


def times_of(engine: Engine, case: Case, repeat: int = 0) -> Times:
    """What an exact answer took, asked for as the workers do."""
    times = engine.answer(pictures(case, repeat), PROMPT, case.new_tokens, exact=True).times
    assert times is not None
    return times


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_answers_as_its_users_have_it(backend: str, picture: Path, tmp_path: Path) -> None:
    """Driven token by token, without drafts and with nothing kept, the answer is Model.ground's; files, or pixels."""
    folder, mig = make_checkpoint(tmp_path / "m", repetition_penalty=1.3), tmp_path / "m.mig"
    make_quantized(folder, mig)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    for model in [str(folder), *([str(mig)] if backend == "native" else [])]:
        with closing(Backend(model, backend=backend, threads=1)) as engine:
            found = [engine.answer(images, "where?", 12) for images in ([picture, picture], [pixels, pixels])]
        with load(model, backend=backend, threads=1) as own:
            want = own.ground([picture, picture], "where?", max_new_tokens=12)
            text = own._vocabulary.decode((token.id for token in want.tokens), skip_special=True)
        assert [answer.text for answer in found] == [text, text]
        assert found[0].times is not None and found[0].times.prompt_tokens == want.prompt_tokens
        assert found[0].times.new_tokens == len(want.tokens) + (want.finish == "stop")


def test_a_backend_is_named_and_an_unknown_one_refused(tiny: Path) -> None:
    with pytest.raises(MigicianError, match="backend 'abacus' is not part of this version"):
        Backend(str(tiny), backend="abacus")
    with closing(Backend("nano", threads=1)) as engine:
        assert engine.name == "nano" and engine.versions == {"kernels": Pool(1).isa}


def test_an_end_of_text_ends_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    case = Case(1, 56, 84, 6)
    seen: list[int] = []

    class Spy(Session):
        def greedy(self, repetition_penalty: float = 1.0) -> tuple[int, float]:
            found = super().greedy(repetition_penalty)
            seen.append(found[0])
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "Session", Spy)
        run = times_of(Backend(str(folder), threads=1), case)
        settings = json.loads((folder / "generation_config.json").read_text())
        settings["eos_token_id"] = [seen[0]]
        (folder / "generation_config.json").write_text(json.dumps(settings))
        seen.clear()
        run = times_of(Backend(str(folder), threads=1), case)
    assert len(seen) == 6 and run.steps_ms and len(run.steps_ms) == 5 and run.new_tokens == 6
    assert run.total_ms == pytest.approx(sum(run.to_dict()[f"{phase}_ms"] for phase in PHASES))
    assert run.cpu_ms is not None and set(run.cpu_ms) == set(PHASES) and run.peak_rss_mb is None


def test_every_answer_starts_with_an_empty_timeline(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, list[int]]] = []

    class Spy(Session):
        def sync(self, ids: Any, visions: Any) -> None:
            before = self.length
            super().sync(ids, visions)
            synced.append((before, list(ids)))

    monkeypatch.setattr(native, "Session", Spy)
    engine, case = Backend(str(tiny), threads=1), Case(1, 56, 84, 2)
    for repeat in range(2):
        times_of(engine, case, repeat)
    other, prompt = synced[2][1], synced[3][1]
    assert len(other) == 1 and other[0] != prompt[0] and synced[3][0] == 1


def test_a_question_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", max_positions=64)
    case = Case(1, 56, 84, 4000)
    with pytest.raises(MigicianError, match="fewer --pictures"):
        times_of(Backend(str(folder), threads=1), case)


# ---------------------------------------------------------------------------------------------------------- the command


def last_object(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_last_line_is_the_whole_result(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    words = ["latency", "--model", str(tiny), "--pictures", "1,2", *SMALL, "-o", str(out)]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = last_object(done.stdout)
    assert json.loads(out.read_text()) == found
    assert [case["pictures"] for case in found["cases"]] == [1, 2]
    for case in found["cases"]:
        ours = case["engines"]["migician"]
        assert len(ours["total_ms"]["values"]) == 2
        assert set(ours["shares"]) == {"vision", "prefill", "decode"} and min(ours["shares"].values()) > 0
        assert set(ours["cpu_ms"]) == {"preprocess", "vision", "prefill", "decode"}
        assert case["patches"] == case["pictures"] * 24 and ours["peak_rss_mb"] > 1
    assert found["ceilings"]["threads"] == 1 and found["missing"] == []
    assert found["settings"]["backend"] == "native" and set(found["engines"]["migician"]["versions"]) == {"kernels"}
    assert "of the ceiling" in done.stdout and "each token" in done.stdout


def test_ceilings_are_the_medians_of_the_repeats(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter([4e9, 1e9, 2e9])

    def ceilings(threads: int) -> dict[str, Any]:
        rates = {"read_bytes": next(reads), "read_bytes_1": 1e9, "f32_ops": 1e9, "int8_ops": 4e9, "bf16_ops": 0.0}
        return {"isa": "scalar", "threads": threads, **rates}

    monkeypatch.setattr(measure_module, "_ceilings", ceilings)
    words = ["latency", "--model", str(tiny), *SMALL[:-4], "--repeat", "3", "--threads", "1"]
    done = CliRunner().invoke(command, words)
    found = last_object(done.stdout)["ceilings"]
    assert found["read_bytes"] == 2e9 and found["isa"] == "scalar" and found["threads"] == 1


def test_a_missing_peer_is_named(tiny: Path, tmp_path: Path) -> None:
    words = ["latency", "--model", str(tiny), *SMALL, "--no-ceilings", "--against", "onnxruntime,llama.cpp"]
    done = CliRunner().invoke(command, [*words, "--llama-cpp", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    missing = {entry["engine"]: entry["why"] for entry in last_object(done.stdout)["missing"]}
    assert set(missing) == {"onnxruntime", "llama.cpp"} and "no llama-mtmd-cli" in missing["llama.cpp"]
    assert "left out: llama.cpp" in done.stdout and "left out: llama.cpp" in done.stderr


def test_a_peer_in_another_python_sees_this_package_alone(tiny: Path, tmp_path: Path) -> None:
    """Whatever Python is named: its own packages decide whether the peer is there."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH" > {tmp_path}/path\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = ["latency", "--model", str(tiny), *SMALL, "--no-ceilings", "--against", "openvino:f32"]
    done = CliRunner().invoke(command, [*words, "--python", f"openvino={python}"], catch_exceptions=False)
    assert last_object(done.stdout)["missing"][0]["engine"] == "openvino f32"
    path = (tmp_path / "path").read_text().strip()
    assert ":" not in path and not Path(path).exists()  # one folder, removed afterwards


@pytest.mark.slow
def test_transformers_answers_the_same_question(tiny: Path) -> None:
    words = ["latency", "--model", str(tiny), *SMALL, "--no-ceilings", "--against", "transformers:fp32"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    found = last_object(done.stdout)
    assert found["missing"] == [], found["missing"]
    case = found["cases"][0]
    theirs = case["engines"]["transformers fp32"]
    assert theirs["prompt_tokens"] == case["prompt_tokens"] and len(theirs["total_ms"]["values"]) == 2
    assert set(case["ratios"]["transformers fp32"]) >= {"vision", "prefill", "decode", "total", "peak_rss_mb"}
    assert "x ours" in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--pictures", "0"], "numbers from 1 to 64"),
        (["--pictures", "x"], "list of numbers"),
        (["--size", "20x20"], "no WIDTHxHEIGHT"),
        (["--python", "openvino"], "ENGINE=PATH"),
    ],
)
def test_wrong_words_are_a_usage_error(words: list[str], line: str) -> None:
    done = CliRunner().invoke(command, ["latency", *words])
    assert done.exit_code == 2 and line in done.output


def test_failures_are_one_line(tmp_path: Path) -> None:
    for words, wanted in (
        (["--model", str(tmp_path / "none.mig")], "none.mig"),
        (["--against", "torch"], "choose from transformers"),
        (["--against", "transformers"], "--reference"),
    ):
        code = "from migician.bench.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, "latency", *words], capture_output=True, text=True)
        assert done.returncode == 1 and wanted in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


# ---------------------------------------------------------------------------------------------------------------- peers


def test_peers_are_chosen_by_engine_and_setting() -> None:
    assert choose_peers("transformers:fp32,llama.cpp") == [Setting("transformers", "fp32"), Setting("llama.cpp")]
    assert [s.name for s in choose_peers("openvino")] == ["openvino bf16", "openvino f32"]
    with pytest.raises(MigicianError, match="transformers:bf16 or transformers:fp32"):
        choose_peers("transformers:int8")


LOG = """\
0.02.734.827 I encoding mtmd batch, n_chunks = 1 (done = 1, total = 3)
0.18.950.612 I mtmd batch encoding done in 709 ms
0.25.499.726 I image decoded (batch 1/1) in 1054 ms
0.26.950.612 I mtmd batch encoding done in 691 ms
0.29.882.407 I llama_perf_context_print:        load time =     612.11 ms
0.29.882.409 I llama_perf_context_print: prompt eval time =    3540.10 ms /   434 tokens (    8.16 ms per token)
0.29.882.411 I llama_perf_context_print:        eval time =    1337.20 ms /    31 runs   (   43.14 ms per token)
"""


def test_the_log_of_llama_cpp_is_taken_apart() -> None:
    found = read_log(LOG, 2, 32)
    assert found.vision_ms == 1400 and found.decode_ms == 1337.2 and found.preprocess_ms is None
    assert found.prefill_ms == pytest.approx(2140.1)
    assert found.prompt_tokens == 434 and found.total_ms == pytest.approx(4877.3)
    with pytest.raises(MigicianError, match="31 single steps where 15"):
        read_log(LOG, 2, 16)
    with pytest.raises(MigicianError, match="no timings"):
        read_log(LOG, 3, 32)


@pytest.mark.parametrize("stream", [1, 2])
def test_llama_cpp_is_asked_in_a_process_of_its_own(stream: int, picture: Path, tmp_path: Path) -> None:
    """A stand-in program that records its words: which of its streams carries the timings does not matter."""
    program = tmp_path / "llama-mtmd-cli"
    (tmp_path / "log").write_text(LOG)
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "version: 1234 (abc)" && exit\necho "$@" > {tmp_path}/words\n'
        f"cat {tmp_path}/log >&{stream}\necho ' the cup (1,2),(3,4)'\n"
    )
    program.chmod(0o755)
    engine = LlamaCpp(str(tmp_path), "m.gguf", "p.gguf", threads=3)
    pixels = np.zeros((8, 8, 3), np.uint8)
    answer = engine.answer([picture, pixels], "where?", 32, exact=True)
    assert answer.text.endswith("the cup (1,2),(3,4)") and engine.versions == {"llama.cpp": "1234 (abc)"}
    assert answer.times is not None and answer.times.vision_ms == 1400 and (answer.times.peak_rss_mb or 0) > 0.5
    words = (tmp_path / "words").read_text().split()
    assert words[:4] == ["-m", "m.gguf", "--mmproj", "p.gguf"] and words.count("--image") == 2
    assert "--ignore-eos" in words and words[words.index("-n") + 1] == "32" and words[words.index("-p") + 1] == "where?"
    with pytest.raises(UnsupportedError, match="answers of an exact length"):
        engine.answer([picture], "where?", 32)
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    with pytest.raises(MigicianError, match=r"ended with 3 \(no such model\)"):
        engine.answer([], "where?", 32, exact=True)


def test_openvino_phases_add_up() -> None:
    found = split(100.0, 40.0, [70.0, 80.0, 95.0])
    assert found["prefill_ms"] == 35.0 and found["decode_ms"] == 25.0 and found["steps_ms"] == [10.0, 15.0]


# --------------------------------------------------------------------------------------------------------------- energy


def test_rapl_counts_packages_once_and_wraps(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "dtpm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("5000000\n")
    assert [zone.name for zone in rapl_zones(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]
    meter = find_meter(tmp_path)
    assert meter is not None and meter.source == "RAPL"
    start = meter.joules()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000\n")  # wrapped at five joules
    assert meter.joules() - start == pytest.approx(2 + 4.5)


def test_tegrastats_of_two_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tegra_watts("RAM 2/7 CPU [1%@2] VDD_IN 4940mW/4940mW VDD_CPU 600mW/600mW") == 4.94
    assert tegra_watts("RAM 2/3 POM_5V_IN 1905/1905 POM_5V_GPU 40/40") == 1.905
    assert tegra_watts("RAM 2/3") is None
    program = tmp_path / "tegrastats"
    program.write_text("#!/bin/sh\nwhile :; do echo VDD_IN 5000mW/5000mW; sleep 0.01; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    meter = find_meter(tmp_path / "no powercap")
    assert meter is not None and meter.source == "tegrastats"
    while meter.joules() < 0.05:
        pass
    meter.close()


def test_no_meter_where_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_meter(tmp_path) is None
