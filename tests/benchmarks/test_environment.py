import os

from peft_fps.benchmarks.environment import switched


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("PEFT_FPS_TEST_SET", "before")
    with switched({"PEFT_FPS_TEST_SET": "0", "PEFT_FPS_TEST_NEW": "1"}):
        assert (os.environ["PEFT_FPS_TEST_SET"], os.environ["PEFT_FPS_TEST_NEW"]) == ("0", "1")
    assert os.environ["PEFT_FPS_TEST_SET"] == "before"
    assert "PEFT_FPS_TEST_NEW" not in os.environ
