// Package nova is the service in the shapes of OpenStack++ and Nova, so that OpenStack's clients
// as they are synthesise, capture and hand off. It is a façade: every request becomes verbs of
// the service, and nothing is kept here. It is served beside /v1, under the same limits; the
// handler is safe for concurrent use.
//
// # Shapes
//
//	GET    /  /v2.1                               versions, without a token
//	GET    /v2.1/flavors[/detail], /{id}          one for each size of base: cCPUS.mMIB.dGIB
//	GET    /v2.1/images[/detail], /{id}           bases and overlays; DELETE removes an overlay
//	GET    /v2/images, /{id}                      the same as Glance shows them
//	POST   /v2.1/servers                          resume a base or an overlay, or synthesise one
//	GET    /v2.1/servers[/detail], /{id}          and /{id}/metadata, /{id}/ips
//	DELETE /v2.1/servers/{id}                     ends whatever it is, its making included
//	POST   /v2.1/servers/{id}/action              one key, see below
//	GET    /v2.1/servers/{id}/migrations          handoffs, from 2.23; DELETE one from 2.24
//	GET    /v2.1/os-migrations                    of all servers
//
// The actions are pause, unpause, os-stop, os-start, reboot (HARD), os-getConsoleOutput and the
// original's three, which are answered with 202 at once:
//
//	{"cloudlet-base": {"name"}}                                       {"base-disk", "base-memory"}
//	{"cloudlet-overlay-finish": {"overlay-name", "terminate": false}} {"overlay-id"}
//	{"cloudlet-handoff": {"handoff_url", "dest_token", "dest_vmname"}} {"handoff"}
//
// The ids of the first two are images that are queued or saving, then active, or killed with
// the property cloudlet_error. The server goes on, unless terminate is true. handoff_url is
// http(s)://HOST:PORT of another cloudlet, dest_token one that it accepts.
//
// A base is four images, as the original has them: the disk image names the other three by
// their types (cloudlet_base_memory and so on), and all have is_cloudlet, cloudlet_type and
// base_sha256_uuid. An overlay is an image of the type cloudlet_overlay. A server is made from a
// disk image, or from an overlay's. Its metadata may hold overlay_url (synthesise this, which
// must be made on that base), ports ([[ADDRESS:]HOST:]GUEST, with commas between) and probe
// (PORT/PATH: it is ACTIVE once this has answered); other metadata are refused. When it is
// shown they are overlay_url, endpoint_PORT, and where it moved moved_to and moved_server.
//
// # Ids
//
// Clients want UUIDs, so each id of ours is written as one that can be read back, see ids.go.
// A server has its id from the request on: a run and its instance have the same. An image that
// was promised keeps the promised id as long as the operation that made it is remembered (the
// newest 1000), beside the id by its content, under which it is listed.
//
// # Status
//
//	BUILD      it is being made, until the probe has answered
//	ACTIVE     it runs
//	PAUSED     it stands still
//	SHUTOFF    after os-stop; or it has ended, and then cannot be started again
//	MIGRATING  it is being handed off
//	DELETED    it was handed off and runs elsewhere; listed with deleted=True only
//	ERROR      its making failed, it was lost, has panicked or met a disk error; see its fault
//
// # Microversions
//
// 2.1 to 2.24, 2.1 where none is asked for. Others are refused with 406. Of what lies between,
// 2.3, 2.9, 2.19, 2.23 and 2.24 change something here.
//
// # What differs from Nova
//
//   - os-stop pauses the guest and resets it: it keeps its disk and loses its memory, and the
//     host's memory stays taken. os-start lets it boot.
//   - Unknown fields, filters and metadata are refused, as is what could not be had: volumes,
//     networks, keys, user data, several servers at once. What clients send by themselves and
//     asks for nothing ("networks": "auto", min_count 1) is taken.
//   - Metadata do not change. There are no projects, quotas, keypairs or security groups.
//   - /v2.1/images and /v2.1/images/{id} hold Glance's fields beside Nova's: clients that know
//     one endpoint for all services read them as Glance's.
//   - The migrations of a server are listed when they have ended, too. Their bytes are those of
//     the overlays that a handoff sends, memory and disk in one: all stand under memory.
//   - Where the guest's network ends there is a host, with ports: addresses are the host's.
//
// # Errors and tokens
//
// An error is {"itemNotFound": {"code", "message"}} with the name of its status in Nova, and the
// message says what to do; no error is inside a success. Callers bring a token of the daemon's
// tokens file in X-Auth-Token: read may look, operate may do everything, peer nothing here.
// Who it belongs to is an Authenticator's to say.
package nova
