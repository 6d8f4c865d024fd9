"""Documents of a run folder: what older runs wrote is read under today's names."""

import json

from altgrad.records.documents import read_result


def test_the_former_name_of_a_results_details_is_read(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"name": "old", "figures": {"skipped_steps": 2}}))
    content = read_result(tmp_path / "result.json").content
    assert content["details"] == {"skipped_steps": 2}
    assert "figures" not in content
