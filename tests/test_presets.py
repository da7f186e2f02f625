"""Named presets."""

import json

from grpo.config import load_config, parse_config, save_config


def test_a_run_json_that_names_the_default_preset_by_its_earlier_name_is_read(tmp_path):
    save_config(parse_config([]), tmp_path / "run.json")
    saved = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(saved | {"preset": "qwen2-vl-7b"}))
    assert load_config(tmp_path / "run.json") == parse_config([])
