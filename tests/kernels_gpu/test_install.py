"""Installing the package compiles the CUDA C++ kernels where it should, and only there."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_sparse.errors import UnsupportedError, UserError
from vllm_sparse.kernels.cuda import build, install
from vllm_sparse.kernels.cuda.library import BUILD_COMMAND

ROOT = Path(__file__).parents[2]
# Writes its arguments beside itself and makes what it is asked for.
NVCC = """#!/bin/sh
echo "$@" >>"$0.log"
while [ $# -gt 1 ]; do shift; done
echo library >"$1"
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Gives this machine GPUs of some capabilities, by a stand-in for nvidia-smi; none without any."""
    monkeypatch.delenv(install.ENV_BUILD, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'smi'}:/usr/bin:/bin")
    # One that this machine may really have must not count.
    program(tmp_path / "smi" / "nvidia-smi", "#!/bin/sh\nexit 9\n")

    def having(*capabilities):
        lines = "".join(f"echo {capability}\n" for capability in capabilities)
        program(tmp_path / "smi" / "nvidia-smi", f"#!/bin/sh\n{lines}")

    return having


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    compiler = program(tmp_path / "toolkit" / "nvcc", NVCC)
    monkeypatch.setenv("CUDACXX", str(compiler))
    return compiler


def test_without_a_gpu_nothing_is_compiled(machine, monkeypatch, tmp_path):
    assert install.request() == install.Request()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert install.request() == install.Request()


def test_the_machine_s_gpus_count(machine):
    machine("9.0", "8.0", "9.0")
    assert install.request() == install.Request((80, 90))
    machine("7.5", "[N/A]", "12.0")
    assert install.request() == install.Request((120,))


@pytest.mark.parametrize(
    ("text", "architectures", "required"),
    [
        ("0", (), False),
        ("1", build.ARCHITECTURES, True),
        ("90 100", (90, 100), True),
        ("100,90", (90, 100), True),
    ],
)
def test_the_user_may_decide(machine, monkeypatch, text, architectures, required):
    machine("8.6")
    monkeypatch.setenv(install.ENV_BUILD, text)
    assert install.request() == install.Request(architectures, required)


@pytest.mark.parametrize("text", ["yes", "90a", "75", "9.0"])
def test_what_is_no_architecture_is_refused(monkeypatch, text):
    monkeypatch.setenv(install.ENV_BUILD, text)
    with pytest.raises(UserError, match="80, 86, 89, 90, 100, 120"):
        install.request()


def test_it_compiles_for_what_is_wanted(nvcc, tmp_path):
    target = tmp_path / "out" / "kernels.so"
    assert install.compile_for(install.Request((80, 90)), target, 2, pytest.fail)
    assert target.read_text() == "library\n"
    lines = Path(f"{nvcc}.log").read_text().splitlines()
    assert len(lines) == len(build.sources()) + 1
    assert "code=sm_80 -gencode=arch=compute_90a,code=sm_90a" in lines[0]
    assert "-shared" in lines[-1]


def test_builds_at_the_same_time_do_not_write_one_file(nvcc, tmp_path):
    """Of containers that share a volume, say: what appears is always a whole library."""
    program(nvcc, NVCC.replace("echo library", "sleep 0.1; echo library"))
    target = tmp_path / "out" / "kernels.so"
    with ThreadPoolExecutor(3) as pool:
        builds = [pool.submit(build.build, target, (90,), 16) for _ in range(3)]
        assert [done.result() for done in builds] == [target] * 3
    assert target.read_text() == "library\n"
    assert list(target.parent.iterdir()) == [target]
    linked = [line for line in Path(f"{nvcc}.log").read_text().splitlines() if "-shared" in line]
    assert len({line.split()[-1] for line in linked}) == 3


def test_what_cannot_be_written_is_said_before_compiling(nvcc, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert build.main(["--arch", "90", "--out", str(tmp_path / "file" / "kernels.so")]) == 2
    assert f"{tmp_path}/file" in capsys.readouterr().err
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert build.main(["--arch", "90", "--out", str(tmp_path / "kernels.so")]) == 2
    assert "is not writable; write the library elsewhere with --out" in capsys.readouterr().err
    assert not Path(f"{nvcc}.log").exists()
    with pytest.raises(SystemExit, match="2"):
        build.main(["--jobs", "0"])
    assert "0 is not at least 1" in capsys.readouterr().err


def test_a_failure_matters_only_where_it_was_asked_for(nvcc, tmp_path):
    program(nvcc, "#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    said = []
    target = tmp_path / "kernels.so"
    assert not install.compile_for(install.Request((90,)), target, 1, said.append)
    assert "no such architecture" in said[0]
    assert BUILD_COMMAND in said[0]
    with pytest.raises(UnsupportedError, match=r"required: .* failed:\nno such architecture"):
        install.compile_for(install.Request((90,), required=True), target, 1, pytest.fail)
    assert not target.exists()


def setup(tmp_path, wanted):
    """``setup.py build_ext`` without the CPU kernels."""
    where = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *where],
        cwd=ROOT,
        env={**os.environ, "VLLM_SPARSE_NO_EXTENSION": "1", install.ENV_BUILD: wanted},
        capture_output=True,
        text=True,
    )


def built(tmp_path):
    return [str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*.so")]


def test_an_installation_brings_the_library(nvcc, tmp_path):
    done = setup(tmp_path, "90 100")
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == ["vllm_sparse/kernels/cuda/_mma_sp.so"]
    assert setup(tmp_path / "none", "0").returncode == 0
    assert not built(tmp_path / "none")


def test_an_installation_fails_if_what_was_asked_for_fails(nvcc, tmp_path):
    program(nvcc, "#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    done = setup(tmp_path, "90")
    assert done.returncode != 0
    assert "no such architecture" in done.stderr
    assert not built(tmp_path)
    assert "allowed are 0 (nothing)" in setup(tmp_path, "all").stderr


def test_it_needs_nothing_but_the_standard_library():
    """A build environment may lack torch and all other dependencies."""
    code = (
        "import sys; sys.path.insert(0, '.'); from vllm_sparse.kernels.cuda import install; install.request()"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nvcc_may_come_from_pip(monkeypatch, tmp_path):
    """It is the last resort, and its libraries are where nvcc itself does not look."""
    site = tmp_path / "site"
    compiler = program(site / "nvidia" / "cu13" / "bin" / "nvcc", NVCC)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(site))
    which = build.shutil.which
    monkeypatch.setattr(
        build.shutil, "which", lambda name: which(name) if name.startswith(str(tmp_path)) else None
    )
    assert build.find_nvcc() == compiler
    monkeypatch.setenv("CUDACXX", str(program(tmp_path / "own" / "nvcc", NVCC)))
    assert build.find_nvcc() == tmp_path / "own" / "nvcc"
    assert not [word for word in build.link_command(compiler, [], tmp_path / "a.so") if word.startswith("-L")]
    program(site / "nvidia" / "cu13" / "lib" / "libcudart_static.a", "")
    assert f"-L{site}/nvidia/cu13/lib" in build.link_command(compiler, [], tmp_path / "a.so")
