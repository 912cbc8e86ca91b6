"""The chosen step beside the last one: which files are drawn, and on which prompts they are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion.cli.programs.rows import reproduce
from ether_diffusion.cli.programs.studies import chosen_step as main
from ether_diffusion.evaluation.subjects.compact import read_compact
from ether_diffusion.reading import read_json

STUDY = """
protocol: playground
subjects: [beach-ball]
instance_prompt: a photo of a {token} {class}
dino: playground
clip: playground
images_per_prompt: 1
class_images: 0
drift: false
num_inference_steps: 2
training:
  pretrained_model_name_or_path: playground
  max_train_steps: 4
  dino: playground
  clip: playground
  validation_steps: 2
  num_validation_images: 1
arms: {mine: {learning_rate: 3.0e-1}}
planned: {"best minus last": [["mine, best"], [mine]]}
"""


@pytest.mark.slow
def test_the_chosen_step_is_drawn_beside_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    folder = tmp_path / "study"
    main([f"--config={tmp_path / 'study.yaml'}", f"--output_dir={folder}"])
    last, best = (
        read_json(folder / "results" / f"{arm}@0.3" / "beach-ball" / "seed-0.json", dict)
        for arm in ("mine", "mine, best")
    )
    assert best["chosen_step"] == last["chosen_step"]
    same = best["distances"] == pytest.approx(last["distances"], rel=1e-4)
    assert same == (best["chosen_step"] == 4)
    rows = {each["arm"]: each for each in read_compact(folder / "results.json").results}
    assert rows["mine, best"]["way"] == "best"
    assert rows["mine"]["chosen_by"] == last["chosen_by"]  # so that committed rows can be compared, too
    with pytest.raises(SystemExit):
        reproduce([str(folder / "results.json"), f"--output_dir={tmp_path / 'again'}"])
    assert "results.json has mine, best, made of another arm's training" in capsys.readouterr().err
    others = [row["prompt"] for row in last["images"] if row["prompt"] not in last["chosen_by"]]
    assert len(others) == 7  # of ten, three of which are among the default prompts
    (found,) = read_json(folder / "planned.json", dict)["planned"]
    by_hand = [
        sum(row["truth"] for row in each["images"] if row["prompt"] in others) / len(others) for each in (best, last)
    ]
    assert found["difference"]["mean"] == pytest.approx(by_hand[0] - by_hand[1], abs=1e-9)


def test_an_arm_that_chooses_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY.replace("  validation_steps: 2\n", ""))
    with pytest.raises(SystemExit, match="a step is chosen of an adapter of this library, by dino and clip"):
        main([f"--config={tmp_path / 'study.yaml'}", f"--output_dir={tmp_path / 'study'}"])
