"""bertkern fill-mask."""

TEXT = "the [MASK] reads the text"


def test_words_with_probabilities(run, pretrained_folder):
    result = run("fill-mask", TEXT, "-m", pretrained_folder, "--top", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert TEXT in result.stdout
    assert result.stdout.count("%") == 3


def test_a_text_without_mask_is_refused(refused, pretrained_folder):
    assert "[MASK]" in refused("fill-mask", "no place here", "-m", pretrained_folder)


def test_more_words_than_the_vocabulary_are_refused(refused, pretrained_folder):
    assert "--top 999" in refused("fill-mask", TEXT, "-m", pretrained_folder, "--top", "999")


def test_a_model_without_the_head_is_refused(refused, encoder_folder):
    line = refused("fill-mask", TEXT, "-m", encoder_folder)
    assert "missing tensors" in line
