"""Settings: layers, origins, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvstore
from kvstore import cli, config
from kvstore.errors import ConfigError
from kvstore.sizes import format_bytes, parse_bytes


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text('log_level = "DEBUG"\n[service]\nport = 1\nhost = "::1"\n[tiers.dram]\ncapacity = "1GiB"\n')
    environment = {"KVSTORE_SERVICE__PORT": "2", "KVSTORE_TIERS__DRAM__CAPACITY": "2GiB", "KVSTORE_KERNELS": "auto"}
    resolved, origins = config.load(str(path), environment=environment, flags={"service.port": 3})
    assert (resolved.log_level, resolved.service.host, resolved.service.port) == ("DEBUG", "::1", 3)
    assert resolved.tiers["dram"].capacity == "2GiB"
    assert origins["service.port"] == "flag"
    assert origins["tiers.dram.capacity"] == "environment KVSTORE_TIERS__DRAM__CAPACITY"
    assert origins["service.host"] == str(path)


def test_the_file_can_come_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.toml"
    path.write_text("[service]\nport = 7\n")
    assert config.load(environment={"KVSTORE_CONFIG": str(path)})[0].service.port == 7


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KVSTORE_SERVICE__PROT": "1"}, r"unknown setting 'service.prot' .*KVSTORE_SERVICE__PROT.*'port'"),
        ({"KVSTORE_SERVCE__PORT": "1"}, r"unknown setting 'servce' .*did you mean 'service'"),
        ({"KVSTORE_TIERS__DRAM__CAPACTY": "1"}, r"unknown setting 'tiers.dram.capacty' .*'capacity'"),
        ({"KVSTORE_SERVICE__PORT": "many"}, r"int.*service\.port"),
        ({"KVSTORE_SERVICE__PORT": "70000"}, r"service.port is 70000; it must be in -1..65535"),
        ({"KVSTORE_LOG_LEVEL": "LOUD"}, r"log_level is 'LOUD'"),
        ({"KVSTORE_SERVICE__TLS_CERT": "a.pem"}, r"tls_cert and service.tls_key are needed together"),
        ({"KVSTORE_SERVICE__REQUEST_BYTES_MAX": "lots"}, r"service.request_bytes_max is 'lots'"),
        ({"KVSTORE_STORE__MOVER_THREADS": "0"}, r"store.mover_threads is 0; it must be positive"),
        ({"KVSTORE_SERVICE__INFLIGHT_MAX": "0"}, r"service.inflight_max is 0; it must be positive"),
        ({"KVSTORE_SERVICE__STOP_SECONDS_MAX": "inf"}, r"stop_seconds_max is inf; it must be positive and finite"),
        ({"KVSTORE_SERVICE__REQUEST_BYTES_MAX": "0"}, r"service.request_bytes_max is '0'; it must be positive"),
        ({"KVSTORE_TIERS__DRAM": "1GiB"}, r"object.*got `str` - at `tiers.dram`"),
        ({"KVSTORE_TIERS__DRAM__PATH": "x"}, r"tiers.dram.capacity is missing; set it"),
        ({"KVSTORE_TENANTS__A__QUOTA": "1GiB"}, r"object.*got `str` - at `tenants.a.quota`"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(environment=environment)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_parsed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml: No such file"):
        config.load(str(tmp_path / "nowhere.toml"), environment={})
    broken = tmp_path / "broken.toml"
    for text in (b"[service\n", b"\xff\xfe"):
        broken.write_bytes(text)
        with pytest.raises(ConfigError, match="broken.toml"):
            config.load(str(broken), environment={})


def test_variables_of_others_are_no_settings() -> None:
    others = ("CONFIG", "ISA", "KERNELS", "PROFILES", "TOKEN")
    config.load(environment={f"KVSTORE_{name}": "" if name == "CONFIG" else "/somewhere" for name in others})


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1GiB", 1 << 30), ("1.5 MiB", 3 << 19), ("10", 10), (7, 7), ("2kb", 2000)]
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1XB", "-1", True, "1e9"])
def test_bad_sizes_name_the_field(text: str) -> None:
    with pytest.raises(ConfigError, match="tiers.dram.capacity"):
        parse_bytes(text, "tiers.dram.capacity")


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 200 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "200 MiB",
        "3.0 TiB",
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("embeded:/x?dram=1GiB", "did you mean 'embedded'"),
        ("/var/x", "URL scheme"),
        ("embedded:/x?dram=lots", "tiers.dram.capacity is 'lots'"),
        ("embedded:/x?drm=1GiB", "did you mean 'dram'"),
        ("embedded:?nvme=1GiB", "without a path"),
        ("embedded://host/x?dram=1GiB", "has a host"),
        ("embedded:/x", "no tier is configured"),
        ("embedded:?dram=1", "dram"),
    ],
)
def test_a_bad_url_says_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kvstore.connect(url)


def test_config_show_prints_values_and_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "--dram", "1GiB", "--set", "store.mover_threads=2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert 'tiers.dram.capacity = "1GiB"  # flag' in out
    assert "store.mover_threads = 2  # flag" in out
    assert "service.port = 8650  # default" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--prot", "1"], "unknown flag '--prot'; did you mean '--port'"),
        (["serv"], "serve"),
        (["config", "show", "--set", "nonsense"], "NAME=VALUE"),
        (["config", "show", "--set", "service.prot=1"], "did you mean 'port'"),
        (["serve"], "no tier is configured"),
    ],
)
def test_command_line_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "lossless" in out
    assert "nvme" in out
