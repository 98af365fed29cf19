"""The code in docs/ runs."""

from pathlib import Path

from .documents import code_blocks, run_python
from .trtllm_folders import UpstreamFolder

PAGE = Path(__file__).parents[1] / "docs" / "tensorrt_llm.md"


def test_the_code_about_checkpoints_of_tensorrt_llm_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tllm_checkpoint").mkdir()
    UpstreamFolder(tp=2).write(tmp_path / "tllm_checkpoint")
    (tmp_path / "modelopt_export").mkdir()
    lacking = {"rotary_base": ..., "rotary_scaling": ..., "producer": {"name": "modelopt", "version": "0.33"}}
    export = UpstreamFolder(base=500000.0, buffers=None, changes=lacking)
    export.write(tmp_path / "modelopt_export").config.save_pretrained(tmp_path / "Llama-3.1-8B")
    names = run_python(code_blocks(PAGE), PAGE.name)
    assert names["own"].tensors.keys() == names["checkpoint"].tensors.keys()
    assert (tmp_path / "tllm_checkpoint_tp2" / "rank1.safetensors").exists()
    assert names["exported"].config.rotary_base == 500000.0
