package figures

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Readme is the path of the README of a project at root, in which tables of figures stand.
func Readme(root string) string { return filepath.Join(root, "README.md") }

// Publication is what a command puts into the documents of a project.
type Publication struct {
	Name    string // of the table in the README, and of the files in docs
	Results any    // docs/NAME.json
	Picture string // docs/NAME.svg; "": none
	Table   string // the text between the table's lines, which ends with a newline
}

// Put puts it into the project at root. What can be written is, where an error is returned,
// too.
func (p Publication) Put(root string) error {
	docs := filepath.Join(root, "docs")
	err := errors.Join(os.MkdirAll(docs, 0o755), WriteJSON(filepath.Join(docs, p.Name+".json"), p.Results))
	if p.Picture != "" {
		err = errors.Join(err, os.WriteFile(filepath.Join(docs, p.Name+".svg"), []byte(p.Picture), 0o644))
	}
	return errors.Join(err, PutTable(Readme(root), p.Name, p.Table))
}

// HasTable returns an error where a document has no place for a table: before anything is
// measured.
func HasTable(path, name string) error {
	_, err := Table(path, name)
	return err
}

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
