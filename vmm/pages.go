package vmm

// pageSize is the unit of memory and disk residue in bytes.
const pageSize = 4096
