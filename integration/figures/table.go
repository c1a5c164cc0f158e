package figures

import (
	"fmt"
	"os"
	"strings"
)

// Table returns what stands in a document between the lines `<!-- NAME: begin -->` and
// `<!-- NAME: end -->`.
func Table(path, name string) (string, error) {
	_, table, _, err := cutTable(path, name)
	return table, err
}

// PutTable puts another text there, which ends with a newline.
func PutTable(path, name, text string) error {
	head, _, tail, err := cutTable(path, name)
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(head+text+tail), 0o644)
}

// cutTable cuts a document at the end of the first line and at the begin of the second.
func cutTable(path, name string) (head, table, tail string, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", "", "", err
	}
	begin, end := fmt.Sprintf("<!-- %s: begin -->\n", name), fmt.Sprintf("<!-- %s: end -->\n", name)
	head, rest, ok := strings.Cut(string(text), begin)
	table, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return "", "", "", fmt.Errorf("%s has no lines %q and %q", path, begin, end)
	}
	return head + begin, table, end + tail, nil
}
