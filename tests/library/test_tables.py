from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.data import CSV, DataError

TABLE = """name,size,weight,price,kind
a,1,10,100,cat
b,2,NA,200,dog
c,3,30,300,cat
d,4,40,400,dog
e,5,50,500,cat
f,6,60,600,dog
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "things.csv"
    file.write_text(TABLE)
    return file


def test_columns_become_features_and_target(path: Path) -> None:
    data = CSV(path, "price", features=["size"])
    assert data.inputs.equal(torch.tensor([[1.0], [2], [3], [4], [5], [6]]))
    assert data[2][0].equal(torch.tensor([3.0]))
    assert data[2][1].equal(torch.tensor(300.0))
    assert data.lines == [2, 3, 4, 5, 6, 7]
    assert CSV(path, "price", ignore=["name", "kind"], missing="drop").features == ["size", "weight"]


def test_several_targets_make_a_row_each(path: Path) -> None:
    data = CSV(path, ["price", "size"], features=["weight"], missing="mean", standardize_target=True, train_path=path)
    assert data.targets is not None
    assert data.targets.shape == (6, 2)
    assert torch.allclose(data.original_units(data.targets)[4], torch.tensor([500.0, 5.0]))


def test_missing_cells_are_an_error_with_line_and_column_or_dropped_or_the_training_mean(path: Path) -> None:
    given: dict[str, Any] = {"features": ["weight"]}
    with pytest.raises(DataError, match=r"things.csv line 3, column 'weight': no value; set missing: drop or mean"):
        CSV(path, "price", **given)
    dropped = CSV(path, "price", missing="drop", **given)
    assert dropped.inputs[:, 0].tolist() == [10, 30, 40, 50, 60]
    assert dropped.lines == [2, 4, 5, 6, 7]
    filled = CSV(path, "price", missing="mean", train_path=path, **given)
    assert filled.inputs[:, 0].tolist() == [10, 38, 30, 40, 50, 60]


def test_the_parts_of_a_file_are_disjoint_and_scaled_by_the_training_rows_alone(path: Path) -> None:
    parts = [
        CSV(path, "price", features=["size"], split=s, train_path=path, parts=[0.5, 0.25, 0.25],
            standardize=True, standardize_target=True)
        for s in ("train", "val", "test")
    ]  # fmt: skip
    assert sorted(line for part in parts for line in part.lines) == [2, 3, 4, 5, 6, 7]
    train = parts[0]
    assert torch.allclose(train.inputs.mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(train.inputs.std(correction=0), torch.tensor(1.0))
    for part in parts:
        assert part.targets is not None
        back = part.original_units(part.targets)
        assert torch.allclose(back, torch.tensor([100.0 * (line - 1) for line in part.lines]))
        assert torch.allclose(part.original_units(part.targets[:, None])[:, 0], back)
    size = np.array([line - 1 for line in train.lines])
    assert torch.allclose(
        parts[1].inputs[:, 0], torch.tensor((np.array(parts[1].lines) - 1 - size.mean()) / size.std()).float()
    )


def test_another_file_is_used_whole_and_treated_as_the_training_rows_were(path: Path) -> None:
    new = path.with_name("new.csv")
    new.write_text("weight,size\n,7\n70,8\n")
    given: dict[str, Any] = {
        "features": ["size", "weight"], "split": "test", "train_path": path, "standardize": True, "missing": "mean",
    }  # fmt: skip
    train = CSV(path, "price", **{**given, "split": "train", "parts": [1.0]})
    data = CSV(new, "price", **{**given, "parts": [1.0]})
    assert data.targets is None
    assert data.inputs.shape == (2, 2)
    size, weight = np.arange(1, 7), np.array([10, 38, 30, 40, 50, 60])
    assert torch.allclose(data.inputs[:, 0], torch.tensor((np.array([7, 8]) - size.mean()) / size.std()).float())
    assert torch.allclose(data.inputs[:, 1], torch.tensor((np.array([38, 70]) - weight.mean()) / weight.std()).float())
    assert len(train) == 6


def test_a_file_whose_target_cells_are_all_empty_is_for_prediction(path: Path) -> None:
    new = path.with_name("new.csv")
    new.write_text("size,price\n7,\n8,\n")
    data = CSV(new, "price", features=["size"], train_path=path)
    assert data[1].equal(torch.tensor([8.0]))
    new.write_text("size,price\n7,\n8,800\n")
    with pytest.raises(DataError, match=r"new.csv line 2, column 'price': no value.*leave out the whole column"):
        CSV(new, "price", features=["size"], train_path=path)


def test_words_are_classes_by_the_training_rows(path: Path) -> None:
    given: dict[str, Any] = {"features": ["size"], "kind": "classification", "train_path": path}
    data = CSV(path, "kind", **given)
    assert data.classes == ["cat", "dog"]
    assert data.targets is not None
    assert data.targets.tolist() == [0, 1, 0, 1, 0, 1]
    new = path.with_name("new.csv")
    new.write_text("size,kind\n7,dog\n8,bird\n")
    with pytest.raises(
        DataError, match=r"new.csv line 3, column 'kind': class 'bird' is in no training row.* cat, dog"
    ):
        CSV(new, "kind", **given)
    new.write_text("size,kind\n7,10\n8,9\n")
    assert CSV(new, "kind", **{**given, "train_path": new}).classes == ["9", "10"]


def test_classes_are_stratified_over_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_text("x,y\n" + "".join(f"{i},{'a' if i % 5 else 'b'}\n" for i in range(100)))
    for split, expected in [("train", 16), ("val", 2), ("test", 2)]:
        data = CSV(path, "y", kind="classification", split=split, train_path=path)
        assert data.targets is not None
        assert int(data.targets.sum()) == expected


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("", {}, r"t.csv is empty; expected a first line"),
        ("a,y\n1,2\n3\n", {}, r"t.csv line 3: expected 2 columns as in the header, found 1; is ',' the delimiter"),
        ("a,y\n1,2\nx,4\n", {}, r"t.csv line 3, column 'a': expected a number, found 'x'"),
        ("a,y\n1,2\ninf,4\n", {}, r"t.csv line 3, column 'a': expected a number, found 'inf'"),
        ("a,y\n1,\n", {}, r"t.csv line 2, column 'y': no value"),
        ("a,a,y\n1,1,2\n", {}, r"t.csv line 1: column 'a' occurs more than once"),
        ("a,y\n", {}, r"no row remains"),
        ("a,yy\n1,2\n", {}, r"t.csv has no column 'y'; it has a, yy; did you mean yy\?"),
        ("y\n1\n", {}, r"no feature remains"),
        ("a,y\n1,2\n", {"features": ["b"]}, r"no column 'b'"),
        ("a,y\n1,2\n", {"standardize": True}, r"learned from the training rows: give train_path"),
        ("a,y\n1,2\n", {"split": "train"}, r"give train_path"),
        ("a,y\n1,2\n", {"kind": "ranking"}, r"regression or classification, found 'ranking'"),
        ("a,y\n1,2\n", {"missing": "zero"}, r"error, drop or mean, found 'zero'"),
        ('a,y\n"1,2\n', {}, r"t.csv line 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_reported_with_line_and_column(
    tmp_path: Path, text: str, given: dict[str, Any], message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        CSV(path, "y", **given)


def test_a_missing_file_and_bytes_that_are_not_text_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*gone.csv"):
        CSV(tmp_path / "gone.csv", "y")
    (tmp_path / "b.csv").write_bytes(b"a,y\n\xff\xfe,2\n")
    with pytest.raises(DataError, match=r"expected UTF-8 text"):
        CSV(tmp_path / "b.csv", "y")


def test_a_file_that_changes_is_read_again(path: Path) -> None:
    assert len(CSV(path, "price", features=["size"])) == 6
    path.write_text("size,price\n1,2\n")
    assert len(CSV(path, "price", features=["size"])) == 1


def test_an_excel_file_with_byte_order_mark_semicolons_and_quotes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes('\ufeffa;y\r\n"1";2\r\n"3";4\r\n'.encode())
    assert CSV(path, "y", delimiter=";").inputs[:, 0].tolist() == [1, 3]
