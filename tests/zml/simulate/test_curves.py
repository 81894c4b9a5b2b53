"""What zml was measured to take, as the simulator uses it."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from zml.commands.simulate import simulate
from zml.errors import ZmlError
from zml.simulate.curves import Calibrated, Curves, Point, read

HERE = Path(__file__).parents[3] / "bench" / "curves"


def curves(shards: int = 2, wrong: float = 1.0) -> Curves:
    """Steps that take 10 ms + 1 ms a sample and, with others, 5 ms + 4 ms x workers / shards."""
    points = [
        Point(
            workers=workers,
            shards=shards,
            batch=batch,
            steps=100,
            compute_s=0.01 + 0.001 * batch,
            step_s=wrong * (0.01 + 0.001 * batch + (0.005 + 0.004 * workers / shards) * (workers > 1)),
            wire_s=0.0,
        )
        for workers in (1, 2, 4)
        for batch in (8, 16)
    ]
    return Curves(model="m", about="made up", samples=800, epochs=3, noise=32.0, points=points)


def test_the_formula_is_found_again_and_carried_on() -> None:
    model = Calibrated(curves())
    assert max(map(abs, model.errors())) < 1e-6
    assert model.step([16], 8)[0] == pytest.approx(0.018 + 0.005 + 0.004 * 8)
    assert (model.asked, model.epochs, model.progress(1)) == (8, 3, 100.0)
    assert "5.0 + 4.0 x workers/shards ms" in str(model) and "error on 6 measured points 0.0%" in str(model)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    with pytest.raises(ZmlError, match="cannot be read"):
        read(file)
    file.write_bytes(msgspec.json.encode(curves()).replace(b'"step_s":', b'"step":'))
    with pytest.raises(ZmlError, match="missing required field"):
        read(file)


def test_jobs_train_what_was_measured_here(tmp_path: Path) -> None:
    workload, file = tmp_path / "w.csv", tmp_path / "m.json"
    workload.write_text("name,time,application,num_replicas,batch_size\na,0,m,1,8\nb,30,m,2,16\n")
    file.write_bytes(msgspec.json.encode(curves()))
    done = CliRunner().invoke(
        simulate,
        [str(workload), "--curves", str(file), "--policy", "las", "--nodes", "1"],
        standalone_mode=False,
    )
    assert done.exception is None, done.exception
    assert "m: computing 10.0 + 1.00 x samples ms" in done.output and "las" in done.output


def test_the_curves_that_come_with_zml_can_be_used() -> None:
    for file in HERE.glob("*.json"):
        wrong = [abs(error) for error in read(file).errors()]
        assert sum(wrong) / len(wrong) < 0.25, "a formula that is no better says nothing"
