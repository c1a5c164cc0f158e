package nova

import (
	"regexp"
	"strings"
)

// Nova's clients take ids of one form only, that of a UUID, and so every id of ours is
// written as one, without a table, so that it can be read back.
//
//	c10d1e70-0000-4000-8000-HHHHHHHHHHHH   the server of the instance HHHHHHHHHHHH, whose run
//	                                       is the operation of the same id
//	c10d1e7K-0000-4000-8000-HHHHHHHHHHHH   the image of kind K that the operation makes
//	any other                              the image of kind K, its last digit, of the base or
//	                                       overlay whose id begins with the 31 digits before
const (
	idHead = "c10d1e7"
	idBody = "-0000-4000-8000-"
)

// kind is what an image is.
type kind int

// The kinds of image: the four of a base, and an overlay.
const (
	baseDisk kind = iota + 1
	baseMemory
	baseDiskHash
	baseMemoryHash
	overlayImage
)

// kindNames are the values of cloudlet_type.
var kindNames = map[kind]string{
	baseDisk: "cloudlet_base_disk", baseMemory: "cloudlet_base_memory",
	baseDiskHash: "cloudlet_base_disk_hash", baseMemoryHash: "cloudlet_base_memory_hash",
	overlayImage: "cloudlet_overlay",
}

var (
	uuidForm  = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	shortForm = regexp.MustCompile(`^` + idHead + `([0-5])` + idBody + `([0-9a-f]{12})$`)
)

// serverID is the id of the server of an instance, or of the operation that makes it.
func serverID(id string) string { return idHead + "0" + idBody + id }

// instanceOf is the instance of a server.
func instanceOf(id string) (string, bool) {
	m := shortForm.FindStringSubmatch(id)
	if m == nil || m[1] != "0" {
		return "", false
	}
	return m[2], true
}

// imageID is the id of an image of the base or overlay id.
func imageID(id string, k kind) string {
	d := id[:31] + string(rune('0'+k))
	return d[:8] + "-" + d[8:12] + "-" + d[12:16] + "-" + d[16:20] + "-" + d[20:]
}

// promisedID is the id of an image that an operation makes.
func promisedID(operation string, k kind) string {
	return idHead + string(rune('0'+k)) + idBody + operation
}

// imageName is what an image's id says: the beginning of the id of a base or overlay, or the
// operation that makes one.
type imageName struct {
	kind      kind
	begins    string
	operation string
}

// imageOf reads the id of an image.
func imageOf(id string) (n imageName, ok bool) {
	if m := shortForm.FindStringSubmatch(id); m != nil {
		n = imageName{kind: kind(m[1][0] - '0'), operation: m[2]}
	} else if uuidForm.MatchString(id) {
		d := strings.ReplaceAll(id, "-", "")
		n = imageName{kind: kind(d[31]) - '0', begins: d[:31]}
	}
	_, ok = kindNames[n.kind]
	return n, ok
}
