import csv

from pixelwise.train.folder import COLUMNS, History, read_history


def rows_of(path):
    return [int(row["step"]) for row in read_history(path)]


def test_rows_have_all_columns_and_six_digits(tmp_path):
    path = tmp_path / "metrics.csv"
    History(path).add(step=10, epoch=0.123456789, lr=1e-5, train_loss=float("nan"), val_miou=0.5)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == COLUMNS
    assert row["epoch"] == "0.123457" and row["lr"] == "1e-05" and row["train_loss"] == "nan"
    assert row["val_global_accuracy"] == ""
    assert path.read_bytes().count(b"\r") == 0


def test_a_new_run_starts_an_empty_log(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    History(path).add(step=1)
    History(path)
    assert rows_of(path) == []
    assert path.read_text() == ",".join(COLUMNS) + "\n"


def test_a_resumed_run_keeps_what_it_will_not_do_again(tmp_path):
    path = tmp_path / "metrics.csv"
    log = History(path)
    for step in (10, 20, 20, 30, 40):
        log.add(step=step, train_loss=step / 10)
    log = History(path, first_step=20)
    assert rows_of(path) == [10, 20, 20]
    log.add(step=30, train_loss=9.0)
    assert rows_of(path) == [10, 20, 20, 30]
    assert read_history(path)[-1]["train_loss"] == "9" and read_history(path)[0]["train_loss"] == "1"


def test_a_line_cut_anywhere_is_left_out_and_never_misread(tmp_path):
    path = tmp_path / "metrics.csv"
    log = History(path)
    log.add(step=10, train_loss=0.5)
    good = len(path.read_bytes())
    log.add(
        step=20,
        epoch=1.5,
        elapsed_s=12.75,
        lr=0.001,
        train_loss=0.25,
        images_per_s=9.5,
        val_miou=0.5,
        val_global_accuracy=0.875,
    )
    whole = path.read_bytes()
    for end in range(good, len(whole)):
        path.write_bytes(whole[:end])
        assert rows_of(path) == [10], whole[good:end]
    path.write_bytes(whole)
    assert rows_of(path) == [10, 20]
    path.write_bytes(whole[:-4])
    History(path, first_step=20).add(step=30)
    assert rows_of(path) == [10, 30]


def test_a_missing_or_strange_log_has_no_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_history(path) == []
    for content in (b"", b"\n", b"step", b"a,b\n1,2\n", b"\xff\x00\xfe\n\x00", b"step,epoch\nx,1\n-5,1\n2.5,1\n"):
        path.write_bytes(content)
        assert read_history(path) == []
