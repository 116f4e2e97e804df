"""Settings of the judge: what is private stays private, and what would have no effect is refused."""

import pytest
from pydantic import ValidationError
from vlpost.model.records import VlpostError
from vlpost.rewards import RewardsConfig
from vlpost.rewards.config import RewardConfigError
from vlpost.rewards.judge_client import read_api_key, retry_after_seconds
from vlpost.rewards.judge_config import JudgeConfig, JudgeUrlError, ServeConfig, is_loopback
from vlpost.rewards.judge_server import JudgeServerError, model_source, model_state, serve_command

LOCAL = {"url": "http://127.0.0.1:8000/v1", "model": "m"}


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "0", "0x0", "0.0", "[::ffff:0.0.0.0]"])
def test_every_interface_is_no_address(host):
    with pytest.raises(JudgeUrlError, match="every interface"):
        JudgeConfig(url=f"http://{host}:8000/v1", model="m", allow_plain_http=True)


@pytest.mark.parametrize("host", ["192.168.1.7", "judge.example.com", "127.0.0.1.example.com", "[fe80::1]", "127.1"])
def test_plain_http_to_another_machine_needs_a_word(host):
    with pytest.raises(ValidationError, match="allow_plain_http"):
        JudgeConfig(url=f"http://{host}:8000/v1", model="m")
    assert JudgeConfig(url=f"http://{host}:8000/v1", model="m", allow_plain_http=True).url
    assert JudgeConfig(url=f"https://{host}:8000/v1", model="m").url


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.9.1"])
def test_plain_http_stays_on_this_machine(host):
    assert is_loopback(JudgeConfig(url=f"http://{host}:8000/v1/", model="m").base_url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:s3cret@host/v1",
        "https://s3cret@host/v1",
        "https://host/v1?key=s3cret",
        "https://host/v1#s3cret",
        "ftp://s3cret",
        "s3cret",
    ],
)
def test_a_key_in_the_address_is_refused_without_showing_it(url):
    described = {"components": {"a": {"use": "llm_judge"}}, "judge": {"url": url, "model": "m"}}
    with pytest.raises(VlpostError) as refusal:
        RewardsConfig.model_validate(described)
    assert "s3cret" not in str(refusal.value)
    assert "s3cret" not in repr(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": None}, "either `url` and `model`"),
        ({"model": None}, "name the model"),
        ({"serve": {"model": "org/name"}}, "either `url`"),
        ({"url": None, "model": "m", "serve": {"model": "org/name"}}, "judge.model has no effect"),
        ({"url": None, "model": None, "api_key_env": "K", "serve": {"model": "org/name"}}, "has no effect beside `serve`"),
        ({"extra_body": {"temperature": 1}}, "sets 'temperature'"),
        ({"api_key": "x"}, "Extra inputs"),
        ({"deadline_s": 0}, "greater than 0"),
        ({"deadline_s": float("inf")}, "finite"),
    ],
)
def test_settings_that_contradict_are_refused(change, words):
    with pytest.raises(ValidationError, match=words):
        JudgeConfig.model_validate({**LOCAL, **change})


@pytest.mark.parametrize(
    "name",
    [
        *("host", "--host", "port", "api-key", "api_key", "api", "trust-remote-code", "trust_remote", "config", "served-model-name"),
        *("allowed_local_media_path", "worker-cls", "log-config-file", "", "max model len", "x;y"),
    ],
)
def test_an_argument_that_opens_the_server_is_not_passed_on(name):
    with pytest.raises(ValidationError, match="not passed on"):
        ServeConfig(model="org/name", arguments={name: "1"})


def test_the_servers_command_line_binds_loopback_and_holds_no_token():
    config = ServeConfig(
        model="org/name", revision="abc", arguments={"max_model_len": 512, "enforce_eager": True, "async-scheduling": False}
    )
    command = serve_command(config, model="org/name", port=7)
    assert command[1:] == [
        *("-P", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "7", "--model", "org/name"),
        *("--served-model-name", "judge", "--gpu-memory-utilization", "0.3"),
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}', "--revision", "abc"),
        *("--max-model-len=512", "--enforce-eager", "--no-async-scheduling"),
    ]


def test_a_bare_model_name_is_refused_and_a_folder_starts_at_the_recipe(tmp_path):
    with pytest.raises(ValidationError, match="neither a folder nor a hub id"):
        ServeConfig(model="model")
    folder = tmp_path / "exported"
    folder.mkdir()
    with pytest.raises(JudgeServerError, match="no model folder"):
        model_source(ServeConfig(model="./exported"), recipe_folder=tmp_path)
    (folder / "config.json").write_text("{}")
    assert model_source(ServeConfig(model="./exported"), recipe_folder=tmp_path) == str(folder)
    config = JudgeConfig(serve=ServeConfig(model="./exported"))
    state = model_state(config, recipe_folder=tmp_path)
    assert state == model_state(config, recipe_folder=tmp_path)
    (folder / "config.json").write_text("{ }")
    assert model_state(config, recipe_folder=tmp_path) != state


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    assert read_api_key(None) is None
    monkeypatch.setenv("JUDGE_KEY_OF_TEST", "s3cret")
    assert read_api_key("JUDGE_KEY_OF_TEST") == "s3cret"
    for bad in ("s3cret\n", "s3 cret", "s3crét"):
        monkeypatch.setenv("JUDGE_KEY_OF_TEST", bad)
        with pytest.raises(RewardConfigError, match="JUDGE_KEY_OF_TEST holds") as refusal:
            read_api_key("JUDGE_KEY_OF_TEST")
        assert "s3" not in str(refusal.value)
    monkeypatch.delenv("JUDGE_KEY_OF_TEST")
    with pytest.raises(RewardConfigError, match="JUDGE_KEY_OF_TEST is not set"):
        read_api_key("JUDGE_KEY_OF_TEST")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *((None, None), ("", None), ("soon", None), ("-3", None), ("nan", None), ("inf", None), ("1e9", None), ("٣", None)),
        *(("0", 0.0), ("7", 7.0), (" 0.25 ", 0.25), ("99999", 60.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)),
        *(("Wed, 21 Oct 2215 07:28:00 GMT", 60.0), ("Wed, 99 Oct 2015 07:28:00 GMT", None), ("1" * 100, None)),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(header, seconds):
    assert retry_after_seconds(header, limit_s=60.0) == seconds
