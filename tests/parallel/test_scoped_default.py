"""What counts where a layer was given nothing: a value of the process, or of a block in one thread or task."""

import asyncio
import threading

from lite_attention.scoped_default import ScopedDefault


def test_a_block_wins_over_the_process_and_ends_with_what_was_before() -> None:
    default: ScopedDefault[str | None] = ScopedDefault("test", None)
    seen = [default.get()]
    default.set("process")
    with default.scope("outer"):
        with default.scope(None):
            default.set("later")
            seen.append(default.get())
        seen.append(default.get())
    assert [*seen, default.get()] == [None, None, "outer", "later"]


def test_a_block_is_left_by_an_error() -> None:
    default = ScopedDefault("test", 0)
    try:
        with default.scope(1):
            raise ValueError
    except ValueError:
        assert default.get() == 0


def test_threads_see_the_process_and_their_own_blocks_alone() -> None:
    default = ScopedDefault("test", "process")
    inside = threading.Barrier(2)
    seen: dict[str, str] = {}

    def make_layers(name: str) -> None:
        with default.scope(name):
            inside.wait(10)
            seen[name] = default.get()
            inside.wait(10)

    threads = [threading.Thread(target=make_layers, args=(name,)) for name in ("one", "other")]
    with default.scope("main"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {"one": "one", "other": "other"}
        assert default.get() == "main"


def test_tasks_see_their_own_blocks_alone() -> None:
    default = ScopedDefault("test", "process")

    async def made(name: str) -> str:
        with default.scope(name):
            await asyncio.sleep(0)
            return default.get()

    async def together() -> list[str]:
        return await asyncio.gather(made("one"), made("other"))

    assert asyncio.run(together()) == ["one", "other"]
    assert default.get() == "process"
