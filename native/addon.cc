// SPDX-License-Identifier: Apache-2.0
// The exports of plugin/native.ts: argument checks, the call, the result as an object. Every function here reads its
// arguments completely before it makes the first kernel call.
#include <napi.h>

#include <bpf/libbpf.h>
#include <netinet/in.h>

#include <memory>
#include <new>

#include "arguments.h"
#include "aside.h"
#include "background.h"
#include "bpf.h"
#include "connect.h"
#include "error.h"
#include "events.h"
#include "errors_js.h"
#include "faults.h"
#include "features.h"
#include "files.h"
#include "link.h"
#include "names.h"
#include "netns.h"
#include "programs.h"
#include "records.h"
#include "routing.h"
#include "seqpacket.h"
#include "sha256.h"
#include "sockets.h"
#include "state.h"
#include "tc.h"
#include "tcx.h"
#include "topology.h"
#include "watch.h"

namespace ambient {

Napi::Value error_value(Napi::Env env, const KernelError &error) {
  std::string code = errno_name(error.number);
  std::string message = std::string(error.syscall) + " " + error.object + ": " + code;
  if (!error.kernel_message.empty()) message += ", " + error.kernel_message;
  Napi::Object object = Napi::Error::New(env, message).Value();
  object.Set("code", code);
  object.Set("errno", error.number);
  object.Set("syscall", error.syscall);
  if (!error.kernel_message.empty()) object.Set("kernelMessage", error.kernel_message);
  if (!error.verifier_log.empty()) object.Set("verifierLog", error.verifier_log);
  return object;
}

namespace {

using Info = Napi::CallbackInfo;

template <Napi::Value (*function)(const Info &)>
Napi::Value guarded(const Info &info) {
  try {
    return function(info);
  } catch (const ArgumentError &error) {
    auto *name = static_cast<const char *>(info.Data());
    throw Napi::TypeError::New(info.Env(), std::string(name) + ": " + error.message);
  } catch (const KernelError &error) {
    throw Napi::Error(info.Env(), error_value(info.Env(), error));
  } catch (const std::bad_alloc &) {
    auto *name = static_cast<const char *>(info.Data());
    throw Napi::Error(info.Env(), error_value(info.Env(), KernelError(ENOMEM, "malloc", name)));
  }
}

Napi::Value boolean(const Info &info, bool value) { return Napi::Boolean::New(info.Env(), value); }
Napi::Value number(const Info &info, double value) { return Napi::Number::New(info.Env(), value); }
Napi::Value bigint(const Info &info, uint64_t value) { return Napi::BigInt::New(info.Env(), value); }

template <typename T, typename Convert>
Napi::Array array_of(Napi::Env env, const std::vector<T> &elements, Convert convert) {
  Napi::Array array = Napi::Array::New(env, elements.size());
  for (uint32_t i = 0; i < elements.size(); i++) array.Set(i, convert(elements[i]));
  return array;
}

const Name DIRECTIONS[] = {{"ingress", static_cast<uint32_t>(Direction::ingress)},
                           {"egress", static_cast<uint32_t>(Direction::egress)},
                           {nullptr, 0}};
Direction to_direction(Napi::Value value) { return static_cast<Direction>(to_word(value, "direction", DIRECTIONS)); }

const Name ORDERS[] = {{"first", 1}, {"last", 0}, {nullptr, 0}};

uint8_t to_family(Napi::Value value, const std::string &path) {
  int64_t family = value.IsNumber() ? static_cast<int64_t>(value.As<Napi::Number>().DoubleValue()) : 0;
  if (family != 4 && family != 6) wrong_argument(path, "4 or 6");
  return family == 4 ? AF_INET : AF_INET6;
}
int family_number(uint8_t family) { return family == AF_INET ? 4 : 6; }

// ---- descriptors, files, namespaces ----

Napi::Value close(const Info &info) {
  close_fd(to_fd(info[0], "fd"));
  return info.Env().Undefined();
}

Napi::Value openNetns(const Info &info) { return number(info, open_netns(to_path(info[0], "path"))); }

Napi::Value netnsIdentity(const Info &info) {
  NetnsIdentity identity = netns_identity(to_netns(info[0], "netns"));
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("dev", bigint(info, identity.dev));
  object.Set("ino", bigint(info, identity.ino));
  object.Set("cookie", bigint(info, identity.cookie));
  return object;
}

Napi::Value netnsId(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return number(info, netns_id(netns, to_boolean(info[1], "allocate")));
}

Napi::Value lockFile(const Info &info) {
  std::string path = to_path(info[0], "path");
  return number(info, lock_file(path, static_cast<uint32_t>(to_integer(info[1], "timeoutMs", 0, 3600000)), false));
}

Napi::Value lockShared(const Info &info) {
  std::string path = to_path(info[0], "path");
  return number(info, lock_file(path, static_cast<uint32_t>(to_integer(info[1], "timeoutMs", 0, 3600000)), true));
}

Napi::Value isBpffs(const Info &info) { return boolean(info, is_bpffs(to_path(info[0], "path"))); }

Napi::Value mountBpffs(const Info &info) {
  mount_bpffs(to_path(info[0], "path"));
  return info.Env().Undefined();
}

Napi::Value makeDirectory(const Info &info) {
  std::string path = to_path(info[0], "path");
  return boolean(info, make_directory(path, static_cast<mode_t>(to_integer(info[1], "mode", 0, 07777))));
}

Napi::Value removeDirectory(const Info &info) { return boolean(info, remove_directory(to_path(info[0], "path"))); }
Napi::Value renameFile(const Info &info) {
  std::string from = to_path(info[0], "from");
  rename_file(from, to_path(info[1], "to"));
  return info.Env().Undefined();
}
Napi::Value removeFile(const Info &info) { return boolean(info, remove_file(to_path(info[0], "path"))); }
Napi::Value capabilities(const Info &info) { return bigint(info, ambient::capabilities()); }

// ---- links ----

Napi::Value link_value(Napi::Env env, const std::optional<Link> &link) {
  if (!link) return env.Null();
  Napi::Object object = Napi::Object::New(env);
  object.Set("ifindex", link->ifindex);
  object.Set("name", link->name);
  object.Set("kind", link->kind);
  object.Set("mac", link->mac);
  object.Set("mtu", link->mtu);
  object.Set("up", Napi::Boolean::New(env, link->up));
  object.Set("peerIfindex", link->peer_ifindex);
  object.Set("peerNetnsId", link->peer_netns_id);
  object.Set("master", link->master);
  return object;
}

// IFNAMSIZ with its NUL
constexpr size_t NAME_LIMIT = INTERFACE_LEN - 1;

Napi::Value linkByName(const Info &info) {
  int netns = to_netns(info[0], "netns");
  std::string name = to_text(info[1], "name", NAME_LIMIT);
  if (name.empty()) wrong_argument("name", "an interface name, not an empty string");
  return link_value(info.Env(), link_by_name(netns, name));
}

Napi::Value linkByIndex(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return link_value(info.Env(), link_by_index(netns, to_ifindex(info[1], "ifindex")));
}

Napi::Value get_setting(const Info &info, const Ipv4Setting &setting) {
  int netns = to_netns(info[0], "netns");
  return boolean(info, ipv4_setting(netns, to_ifindex(info[1], "ifindex"), setting));
}

Napi::Value set_setting(const Info &info, const Ipv4Setting &setting) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  set_ipv4_setting(netns, ifindex, setting, to_boolean(info[2], "on"));
  return info.Env().Undefined();
}

Napi::Value acceptLocal(const Info &info) { return get_setting(info, ACCEPT_LOCAL); }
Napi::Value setAcceptLocal(const Info &info) { return set_setting(info, ACCEPT_LOCAL); }
Napi::Value migrateRequests(const Info &info) {
  auto on = migrate_requests(to_netns(info[0], "netns"));
  return on ? Napi::Value(boolean(info, *on)) : info.Env().Null();
}

Napi::Value setMigrateRequests(const Info &info) {
  int netns = to_netns(info[0], "netns");
  set_migrate_requests(netns, to_boolean(info[1], "on"));
  return info.Env().Undefined();
}

Napi::Value routeLocalnet(const Info &info) { return get_setting(info, ROUTE_LOCALNET); }
Napi::Value setRouteLocalnet(const Info &info) { return set_setting(info, ROUTE_LOCALNET); }

Napi::Value linkAddresses(const Info &info) {
  int netns = to_netns(info[0], "netns");
  auto addresses = link_addresses(netns, to_ifindex(info[1], "ifindex"));
  return array_of(info.Env(), addresses, [&](const LinkAddress &address) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("address", bytes_object(info.Env(), address.address.data(), 16));
    object.Set("prefix", address.prefix);
    object.Set("scope", address.scope);
    return object;
  });
}

Napi::Value qdiscs(const Info &info) {
  int netns = to_netns(info[0], "netns");
  auto found = ambient::qdiscs(netns, to_ifindex(info[1], "ifindex"));
  return array_of(info.Env(), found, [&](const Qdisc &qdisc) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("kind", qdisc.kind);
    object.Set("handle", qdisc.handle);
    object.Set("parent", qdisc.parent);
    return object;
  });
}

// ---- routing ----

Rule to_rule(Napi::Value value) {
  Fields fields(value, "rule");
  Rule rule = {};
  rule.family = to_family(fields.at("family"), fields.path("family"));
  rule.priority = fields.u32("priority");
  rule.mark = static_cast<uint32_t>(fields.integer("mark", 1, UINT32_MAX));
  rule.table = static_cast<uint32_t>(fields.integer("table", 1, UINT32_MAX));
  rule.protocol = static_cast<uint8_t>(fields.integer("protocol", 1, UINT8_MAX));
  return rule;
}

LocalRoute to_route(Napi::Value value) {
  Fields fields(value, "route");
  LocalRoute route = {};
  route.family = to_family(fields.at("family"), fields.path("family"));
  route.table = static_cast<uint32_t>(fields.integer("table", 1, UINT32_MAX));
  route.protocol = static_cast<uint8_t>(fields.integer("protocol", 1, UINT8_MAX));
  return route;
}

Napi::Value addRule(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return boolean(info, add_rule(netns, to_rule(info[1])));
}

Napi::Value deleteRule(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return boolean(info, delete_rule(netns, to_rule(info[1])));
}

Napi::Value rules(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return array_of(info.Env(), ambient::rules(netns, to_family(info[1], "family")), [&](const Rule &rule) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("family", family_number(rule.family));
    object.Set("priority", rule.priority);
    object.Set("mark", rule.mark);
    object.Set("table", rule.table);
    object.Set("protocol", rule.protocol);
    return object;
  });
}

Napi::Value addLocalRoute(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return boolean(info, add_local_route(netns, to_route(info[1])));
}

Napi::Value deleteLocalRoute(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return boolean(info, delete_local_route(netns, to_route(info[1])));
}

Napi::Value localRoutes(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint8_t family = to_family(info[1], "family");
  auto table = static_cast<uint32_t>(to_integer(info[2], "table", 1, UINT32_MAX));
  return array_of(info.Env(), local_routes(netns, family, table), [&](const LocalRoute &route) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("family", family_number(route.family));
    object.Set("table", route.table);
    object.Set("protocol", route.protocol);
    return object;
  });
}

// ---- state directory ----

// So that no other object can be taken for a State.
const napi_type_tag STATE_TAG = {0x4c1d3f6e9a2b4470, 0xb6a1e08d5f7c2319};

Napi::Value state_value(Napi::Env env, std::unique_ptr<State> state) {
  Napi::Object object = Napi::Object::New(env);
  object.TypeTag(&STATE_TAG);
  napi_status status = napi_wrap(
      env, object, state.get(), [](napi_env, void *data, void *) { delete static_cast<State *>(data); }, nullptr,
      nullptr);
  if (status != napi_ok) throw Napi::Error::New(env);
  state.release();
  return object;
}

State &to_state(const Info &info, size_t at = 0, const char *name = "state") {
  void *state = nullptr;
  bool right = info[at].IsObject() && info[at].As<Napi::Object>().CheckTypeTag(&STATE_TAG) &&
               napi_unwrap(info.Env(), info[at], &state) == napi_ok;
  if (!right) wrong_argument(name, "a State of openState()");
  return *static_cast<State *>(state);
}

struct Key {
  uint8_t bytes[32];
};
Key to_key(Napi::Value value) {
  Key key;
  to_bytes(value, "key", key.bytes, sizeof(key.bytes));
  return key;
}

struct AddressKey {
  uint8_t bytes[16];
};
AddressKey to_address(Napi::Value value) {
  AddressKey address;
  to_bytes(value, "address", address.bytes, sizeof(address.bytes));
  return address;
}

ExclusionRule to_exclusion(Napi::Value value, const std::string &path) {
  Fields fields(value, path);
  ExclusionRule rule = {};
  rule.key.kind = static_cast<uint8_t>(fields.word("kind", EXCLUSION_KINDS));
  const bool address = rule.key.kind == EXCLUDE_OUTBOUND_ADDRESS;
  rule.key.prefix_length = 32 + static_cast<uint32_t>(fields.integer("length", 0, address ? 128 : 16));
  fields.bytes("value", rule.key.value, sizeof(rule.key.value));
  if (fields.boolean("excluded")) rule.reason = address ? REASON_PASS_EXCLUDED_CIDR : REASON_PASS_EXCLUDED_PORT;
  return rule;
}

// An array of {key, record} of every entry that is there when it is read.
template <typename Record>
Napi::Value list(const Info &info, State &state, Map map, const char *key_name,
                 Napi::Value (*key_value)(Napi::Env, const std::string &)) {
  Napi::Array array = Napi::Array::New(info.Env());
  for (const std::string &key : keys(state, map)) {
    Record record;
    if (!lookup(state.fd(map), key.data(), &record, map_name(map))) continue;
    Napi::Object entry = Napi::Object::New(info.Env());
    entry.Set(key_name, key_value(info.Env(), key));
    entry.Set("record", to_object(info.Env(), record));
    array.Set(array.Length(), entry);
  }
  return array;
}

Napi::Value bytes_key(Napi::Env env, const std::string &key) { return bytes_object(env, key.data(), key.size()); }

Napi::Value number_key(Napi::Env env, const std::string &key) {
  uint32_t value;
  memcpy(&value, key.data(), sizeof(value));
  return Napi::Number::New(env, value);
}

template <typename Record>
Napi::Value get(const Info &info, State &state, Map map, const void *key) {
  Record record;
  if (!lookup(state.fd(map), key, &record, map_name(map))) return info.Env().Null();
  return to_object(info.Env(), record);
}

Napi::Value createState(const Info &info) {
  std::string dir = to_path(info[0], "dir");
  Fields fields(info[1], "wanted");
  Fields marks = fields.object("marks");
  WantedState wanted = {};
  // counters has 32 entries for each pod, and a map has at most 2^32 - 1.
  wanted.max_pods = static_cast<uint32_t>(fields.integer("maxPods", 1, UINT32_MAX / 32));
  wanted.max_flows = static_cast<uint32_t>(fields.integer("maxFlows", 1, UINT32_MAX));
  wanted.direct_flows = static_cast<uint32_t>(fields.integer("directFlowsPerPod", 1, UINT32_MAX));
  wanted.mark_bypass = static_cast<uint32_t>(marks.integer("bypass", 1, UINT32_MAX));
  wanted.mark_to_proxy = static_cast<uint32_t>(marks.integer("toProxy", 1, UINT32_MAX));
  wanted.mark_tproxy = static_cast<uint32_t>(marks.integer("tproxy", 1, UINT32_MAX));
  wanted.variant = fields.u32("variant");
  create_state(dir, wanted);
  return info.Env().Undefined();
}

Napi::Value openState(const Info &info) {
  return state_value(info.Env(), std::make_unique<State>(to_path(info[0], "dir")));
}

Napi::Value openStateOver(const Info &info) {
  std::string dir = to_path(info[0], "dir");
  return state_value(info.Env(), std::make_unique<State>(dir, to_path(info[1], "over")));
}

Napi::Value growState(const Info &info) {
  State &state = to_state(info);
  std::string dir = to_path(info[1], "dir");
  Fields wanted(info[2], "wanted");
  Capacity larger = {};
  larger.max_pods = static_cast<uint32_t>(wanted.integer("maxPods", 1, UINT32_MAX / 32));
  larger.max_flows = static_cast<uint32_t>(wanted.integer("maxFlows", 1, UINT32_MAX));
  larger.direct_flows = static_cast<uint32_t>(wanted.integer("directFlowsPerPod", 1, UINT32_MAX));
  auto grown = grow_state(state, dir, larger);
  return array_of(info.Env(), grown, [&](const std::string &map) { return Napi::String::New(info.Env(), map); });
}

Napi::Value copyRecords(const Info &info) {
  State &from = to_state(info, 0, "from");
  copy_records(from, to_state(info, 1, "to"));
  return info.Env().Undefined();
}

Napi::Value copyFlows(const Info &info) {
  State &from = to_state(info, 0, "from");
  copy_flows(from, to_state(info, 1, "to"));
  return info.Env().Undefined();
}

Napi::Value copyTraffic(const Info &info) {
  State &from = to_state(info, 0, "from"), &to = to_state(info, 1, "to");
  copy_traffic(from, to, to_u32(info[2], "ifindex"));
  return info.Env().Undefined();
}

Napi::Value writeCapacity(const Info &info) {
  write_capacity(to_state(info));
  return info.Env().Undefined();
}

Napi::Value closeState(const Info &info) {
  to_state(info).close();
  return info.Env().Undefined();
}

Napi::Value settings(const Info &info) {
  State &state = to_state(info);
  // One field may have changed since the state was opened.
  struct settings settings = state.settings();
  settings.check_cgroups = checks_cgroups(state);
  return to_object(info.Env(), settings);
}

Napi::Value getAttachment(const Info &info) {
  State &state = to_state(info);
  return get<struct attachment>(info, state, ATTACHMENTS, to_key(info[1]).bytes);
}

Napi::Value putAttachment(const Info &info) {
  State &state = to_state(info);
  Key key = to_key(info[1]);
  auto record = to_attachment(info[2], "record");
  update(state.fd(ATTACHMENTS), key.bytes, &record, Update::any, "attachments");
  return info.Env().Undefined();
}

Napi::Value replaceAttachment(const Info &info) {
  State &state = to_state(info);
  Key key = to_key(info[1]);
  auto record = to_attachment(info[2], "record");
  return boolean(info, replace(state.fd(ATTACHMENTS), key.bytes, &record, "attachments"));
}

Napi::Value deleteAttachment(const Info &info) {
  State &state = to_state(info);
  return boolean(info, erase(state.fd(ATTACHMENTS), to_key(info[1]).bytes, "attachments"));
}

Napi::Value listAttachments(const Info &info) {
  return list<struct attachment>(info, to_state(info), ATTACHMENTS, "key", bytes_key);
}

uint32_t to_interface_id(Napi::Value value) {
  return static_cast<uint32_t>(to_integer(value, "ifindex", 1, UINT32_MAX));
}

Napi::Value getInterface(const Info &info) {
  State &state = to_state(info);
  uint32_t id = to_interface_id(info[1]);
  return get<struct interface>(info, state, INTERFACES, &id);
}

Napi::Value putInterface(const Info &info) {
  State &state = to_state(info);
  uint32_t id = to_interface_id(info[1]);
  auto record = to_interface(info[2], "record");
  update(state.fd(INTERFACES), &id, &record, Update::any, "interfaces");
  return info.Env().Undefined();
}

Napi::Value deleteInterface(const Info &info) {
  State &state = to_state(info);
  uint32_t id = to_interface_id(info[1]);
  return boolean(info, erase(state.fd(INTERFACES), &id, "interfaces"));
}

Napi::Value listInterfaces(const Info &info) {
  return list<struct interface>(info, to_state(info), INTERFACES, "ifindex", number_key);
}

Napi::Value getEndpoint(const Info &info) {
  State &state = to_state(info);
  return get<struct endpoint>(info, state, ENDPOINTS, to_address(info[1]).bytes);
}

Napi::Value putEndpoint(const Info &info) {
  State &state = to_state(info);
  AddressKey address = to_address(info[1]);
  auto record = to_endpoint(info[2], "record");
  bool exclusive = to_boolean(info[3], "exclusive");
  update(state.fd(ENDPOINTS), address.bytes, &record, exclusive ? Update::no_exist : Update::any, "endpoints");
  return info.Env().Undefined();
}

Napi::Value deleteEndpoint(const Info &info) {
  State &state = to_state(info);
  return boolean(info, erase(state.fd(ENDPOINTS), to_address(info[1]).bytes, "endpoints"));
}

Napi::Value listEndpoints(const Info &info) {
  return list<struct endpoint>(info, to_state(info), ENDPOINTS, "address", bytes_key);
}

Napi::Value getProxies(const Info &info) {
  State &state = to_state(info);
  // No entry is how the map begins: generation 0, no proxy.
  struct proxies record = {};
  uint32_t key = 0;
  if (!lookup(state.fd(PROXIES), &key, &record, "proxies")) record = {};
  return to_object(info.Env(), record);
}

Napi::Value putProxies(const Info &info) {
  State &state = to_state(info);
  auto record = to_proxies(info[1], info[2]);
  uint32_t key = 0;
  update(state.fd(PROXIES), &key, &record, Update::any, "proxies");
  return info.Env().Undefined();
}

Napi::Value directFlows(const Info &info) {
  State &state = to_state(info);
  uint32_t ifindex = to_interface_id(info[1]);
  return array_of(info.Env(), direct_flows(state, ifindex), [&](const struct tuple &flow) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("source", bytes_object(info.Env(), flow.source, sizeof(flow.source)));
    object.Set("sourcePort", flow.source_port);
    object.Set("destination", bytes_object(info.Env(), flow.destination, sizeof(flow.destination)));
    object.Set("destinationPort", flow.destination_port);
    return object;
  });
}

Napi::Value deleteDirectFlows(const Info &info) {
  State &state = to_state(info);
  uint32_t ifindex = to_interface_id(info[1]);
  return Napi::Number::New(info.Env(), delete_direct_flows(state, ifindex));
}

Napi::Value deleteFlows(const Info &info) {
  State &state = to_state(info);
  uint32_t ifindex = to_interface_id(info[1]);
  return Napi::Number::New(info.Env(), delete_flows(state, ifindex));
}

Napi::Value importDirectFlow(const Info &info) {
  int program = to_fd(info[0], "programFd");
  uint32_t ifindex = to_interface_id(info[1]);
  Fields fields(info[2], "flow");
  struct tuple flow = {};
  fields.bytes("source", flow.source, sizeof(flow.source));
  fields.bytes("destination", flow.destination, sizeof(flow.destination));
  flow.source_port = static_cast<uint16_t>(fields.integer("sourcePort", 0, UINT16_MAX));
  flow.destination_port = static_cast<uint16_t>(fields.integer("destinationPort", 0, UINT16_MAX));
  Import result = import_direct_flow(program, ifindex, flow);
  if (result == Import::no_memory) throw KernelError(ENOMEM, "bpf(BPF_PROG_TEST_RUN)", "direct_import");
  return boolean(info, result == Import::done);
}

Napi::Value listDirectFlows(const Info &info) {
  return array_of(info.Env(), interfaces_with_direct_flows(to_state(info)),
                  [&](uint32_t ifindex) { return Napi::Number::New(info.Env(), ifindex); });
}

Napi::Value putExclusions(const Info &info) {
  State &state = to_state(info);
  uint32_t id = to_interface_id(info[1]);
  std::vector<ExclusionRule> rules;
  for (const Napi::Value &value : to_array(info[2], "rules", MAX_EXCLUSIONS)) {
    rules.push_back(to_exclusion(value, "rules[" + std::to_string(rules.size()) + "]"));
  }
  put_exclusions(state, id, rules);
  return info.Env().Undefined();
}

Napi::Value deleteExclusions(const Info &info) {
  State &state = to_state(info);
  uint32_t ifindex = to_interface_id(info[1]);
  return boolean(info, delete_exclusions(state, ifindex));
}

Napi::Value getExclusions(const Info &info) {
  State &state = to_state(info);
  uint32_t id = to_interface_id(info[1]);
  return array_of(info.Env(), exclusions(state, id), [&](const ExclusionRule &rule) {
    Napi::Object object = Napi::Object::New(info.Env());
    const char *kind = word_of(EXCLUSION_KINDS, rule.key.kind);
    if (!kind) throw KernelError(EPROTO, "bpf(BPF_MAP_GET_NEXT_KEY)", "map exclusion_rules has an unknown kind");
    object.Set("kind", kind);
    object.Set("length", rule.key.prefix_length - 32);
    object.Set("value", bytes_object(info.Env(), rule.key.value, sizeof(rule.key.value)));
    object.Set("excluded", boolean(info, rule.reason != 0));
    return object;
  });
}

Napi::Value listExclusions(const Info &info) {
  return array_of(info.Env(), keys(to_state(info), EXCLUSIONS),
                  [&](const std::string &key) { return number_key(info.Env(), key); });
}

Napi::Value counters(const Info &info) {
  return array_of(info.Env(), ambient::counters(to_state(info)), [&](const CounterSum &sum) {
    Napi::Object object = Napi::Object::New(info.Env());
    const char *program = word_of(PROGRAMS, sum.key.program), *reason = word_of(REASONS, sum.key.reason);
    if (!program || !reason) {
      throw KernelError(EPROTO, "bpf(BPF_MAP_GET_NEXT_KEY)",
                        "map counters has program " + std::to_string(sum.key.program) + ", reason " +
                            std::to_string(sum.key.reason));
    }
    object.Set("ifindex", sum.key.ifindex);
    object.Set("program", program);
    object.Set("reason", reason);
    object.Set("packets", bigint(info, sum.packets));
    object.Set("bytes", bigint(info, sum.bytes));
    return object;
  });
}

Napi::Value deleteCounters(const Info &info) {
  State &state = to_state(info);
  return number(info, delete_counters(state, to_u32(info[1], "ifindex")));
}

// ---- who the proxy is ----

Napi::Value setCheckCgroups(const Info &info) {
  State &state = to_state(info);
  set_check_cgroups(state, to_boolean(info[1], "on"));
  return info.Env().Undefined();
}

Napi::Value putProxyCgroup(const Info &info) {
  State &state = to_state(info);
  uint64_t id = to_u64(info[1], "id");
  uint32_t value = 1;
  update(state.fd(PROXY_CGROUPS), &id, &value, Update::any, "proxy_cgroups");
  return info.Env().Undefined();
}

Napi::Value deleteProxyCgroup(const Info &info) {
  State &state = to_state(info);
  uint64_t id = to_u64(info[1], "id");
  return boolean(info, erase(state.fd(PROXY_CGROUPS), &id, "proxy_cgroups"));
}

Napi::Value listProxyCgroups(const Info &info) {
  return array_of(info.Env(), keys(to_state(info), PROXY_CGROUPS), [&](const std::string &key) {
    uint64_t id;
    memcpy(&id, key.data(), sizeof(id));
    return bigint(info, id);
  });
}

// Both fields: 0 is every interface and every reason.
Napi::Value setTrace(const Info &info) {
  State &state = to_state(info);
  struct trace wanted = {};
  if (!info[1].IsNull()) {
    Fields filter(info[1], "filter");
    wanted.on = 1;
    wanted.ifindex = filter.u32("ifindex");
    if (!filter.at("reason").IsNull()) wanted.reason = filter.word("reason", REASONS);
  }
  uint32_t key = 0;
  update(state.fd(TRACE), &key, &wanted, Update::any, "trace");
  return info.Env().Undefined();
}

Napi::Value getTrace(const Info &info) {
  State &state = to_state(info);
  struct trace found = {};
  uint32_t key = 0;
  lookup(state.fd(TRACE), &key, &found, "trace");
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("on", boolean(info, found.on));
  object.Set("lost", found.lost);
  return object;
}

Napi::Value followEvents(const Info &info) {
  State &state = to_state(info);
  if (!info[1].IsFunction()) wrong_argument("onEvents", "a function");
  return follow_events(info.Env(), state, info[1].As<Napi::Function>());
}

Napi::Value mapUsage(const Info &info) {
  return array_of(info.Env(), map_usage(to_state(info)), [&](const MapUsage &usage) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("map", usage.map);
    object.Set("entries", static_cast<double>(usage.entries));
    object.Set("capacity", static_cast<double>(usage.capacity));
    object.Set("bytes", static_cast<double>(usage.bytes));
    return object;
  });
}

// ---- programs ----

Napi::Value load(const Info &info, bool jump) {
  State &state = to_state(info);
  std::string dir = to_path(info[1], "dir"), tag = to_text(info[2], "tag", 63);
  if (tag.empty() || tag.find_first_of("/.") != std::string::npos) wrong_argument("tag", "a file name without a dot");
  load_programs(state, dir, tag, jump);
  return info.Env().Undefined();
}

Napi::Value loadPrograms(const Info &info) { return load(info, true); }
Napi::Value loadIdlePrograms(const Info &info) { return load(info, false); }

Napi::Value jumpToPrograms(const Info &info) {
  State &state = to_state(info);
  jump_to_programs(state, to_path(info[1], "directory"));
  return info.Env().Undefined();
}

Napi::Value waitForPrograms(const Info &info) {
  wait_for_programs();
  return info.Env().Undefined();
}

const Name STUBS[] = {{"inpod_egress", INPOD_EGRESS},
                      {"inpod_ingress", INPOD_INGRESS},
                      {"inpod_lookup", INPOD_LOOKUP},
                      {nullptr, 0}};
const Name WITHOUT_TARGET[] = {{"pass", 0}, {"drop", 1}, {nullptr, 0}};

Napi::Value loadStub(const Info &info) {
  State &state = to_state(info);
  auto program = static_cast<enum program>(to_word(info[1], "program", STUBS));
  uint32_t id = to_interface_id(info[2]);
  return number(info, load_stub(state, program, id, to_word(info[3], "otherwise", WITHOUT_TARGET)).release());
}

Napi::Value jumpTarget(const Info &info) {
  State &state = to_state(info);
  return number(info, jump_target(state, static_cast<enum program>(to_word(info[1], "program", STUBS))));
}

Napi::Value openProgram(const Info &info) {
  return number(info, get_object(to_path(info[0], "path"), false).release());
}

Napi::Value program_value(Napi::Env env, int fd) {
  ProgramInfo program = program_info(fd);
  Napi::Object object = Napi::Object::New(env);
  object.Set("id", program.id);
  object.Set("name", program.name);
  object.Set("tag", program.tag);
  object.Set("verified", program.verified);
  return object;
}

Napi::Value programInfo(const Info &info) { return program_value(info.Env(), to_fd(info[0], "programFd")); }

Napi::Value programById(const Info &info) {
  Fd fd = program_by_id(to_u32(info[0], "id"));
  return fd ? program_value(info.Env(), fd.get()) : info.Env().Null();
}

Napi::Value testRun(const Info &info) {
  int program = to_fd(info[0], "programFd");
  if (!info[1].IsTypedArray() || info[1].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    wrong_argument("packet", "a Uint8Array");
  }
  Napi::Uint8Array packet = info[1].As<Napi::Uint8Array>();
  TestRunInput input = {0, 0, 0, 1, 0};
  if (!info[2].IsUndefined()) {
    Fields skb(info[2], "skb");
    auto field = [&](const char *name, uint32_t &value, uint32_t minimum) {
      Napi::Value given = skb.at(name);
      if (!given.IsUndefined()) value = static_cast<uint32_t>(to_integer(given, skb.path(name), minimum, UINT32_MAX));
    };
    field("mark", input.mark, 0);
    field("ingressIfindex", input.ingress_ifindex, 0);
    field("ifindex", input.ifindex, 0);
    field("repeat", input.repeat, 1);
    field("interfaceId", input.interface_id, 0);
  }
  // Programs here change bytes and never make a packet longer than by a VLAN tag or so.
  std::vector<uint8_t> out(packet.ElementLength() + 256);
  TestRun run = test_run(program, packet.Data(), packet.ElementLength(), out.data(), out.size(), input);
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("verdict", run.verdict);
  object.Set("packet", bytes_object(info.Env(), out.data(), run.packet_size));
  object.Set("mark", run.mark);
  object.Set("interfaceId", run.interface_id);
  object.Set("nanoseconds", run.nanoseconds);
  return object;
}

// ---- hooks ----

Napi::Value attachTcx(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  Direction direction = to_direction(info[2]);
  int program = to_fd(info[3], "programFd");
  bool first = to_word(info[4], "order", ORDERS);
  uint32_t id = attach_tcx(netns, ifindex, direction, program, first, to_path(info[5], "pinPath"));
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("linkId", id);
  return object;
}

Napi::Value attachTcxAside(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  Direction direction = to_direction(info[2]);
  int program = to_fd(info[3], "programFd");
  bool first = to_word(info[4], "order", ORDERS);
  auto id = std::make_shared<uint32_t>(0);
  return await_call(
      info.Env(), [=, path = to_path(info[5], "pinPath")] {
        *id = attach_tcx(netns, ifindex, direction, program, first, path);
      },
      [=](Napi::Env env) {
        Napi::Object object = Napi::Object::New(env);
        object.Set("linkId", *id);
        return object;
      });
}

Napi::Value attachLookup(const Info &info) {
  int netns = to_fd(info[0], "netns"), program = to_fd(info[1], "programFd");
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("linkId", attach_lookup(netns, program, to_path(info[2], "pinPath")));
  return object;
}

Napi::Value queryTcx(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  return array_of(info.Env(), query_tcx(netns, ifindex, to_direction(info[2])), [&](const TcxEntry &entry) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("programId", entry.program_id);
    object.Set("linkId", entry.link_id);
    return object;
  });
}

Napi::Value linkInfo(const Info &info) {
  auto link = link_info(to_path(info[0], "pinPath"));
  if (!link) return info.Env().Null();
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("linkId", link->link_id);
  object.Set("programId", link->program_id);
  object.Set("kind", link->in_netns ? "netns" : "tcx");
  object.Set("ifindex", link->ifindex);
  object.Set("direction", direction_text(link->direction));
  object.Set("netnsIno", bigint(info, link->netns_ino));
  return object;
}

Napi::Value updateLink(const Info &info) {
  std::string path = to_path(info[0], "pinPath");
  update_link(path, to_fd(info[1], "programFd"));
  return info.Env().Undefined();
}

Napi::Value detachLink(const Info &info) { return boolean(info, detach_link(to_path(info[0], "pinPath"))); }

Napi::Value detachLinkAside(const Info &info) {
  auto found = std::make_shared<bool>(false);
  return await_call(
      info.Env(), [=, path = to_path(info[0], "pinPath")] { *found = detach_link(path); },
      [=](Napi::Env env) { return Napi::Boolean::New(env, *found); });
}

Napi::Value addClsact(const Info &info) {
  int netns = to_netns(info[0], "netns");
  return boolean(info, add_clsact(netns, to_ifindex(info[1], "ifindex")));
}

Napi::Value filters(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  return array_of(info.Env(), ambient::filters(netns, ifindex, to_direction(info[2])), [&](const TcFilter &filter) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("kind", filter.kind);
    object.Set("priority", filter.priority);
    object.Set("protocol", filter.protocol);
    object.Set("handle", filter.handle);
    object.Set("programId", filter.program_id);
    object.Set("name", filter.name);
    object.Set("directAction", boolean(info, filter.direct_action));
    return object;
  });
}

Napi::Value attachFilter(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  Direction direction = to_direction(info[2]);
  int program = to_fd(info[3], "programFd");
  Fields filter(info[4], "filter");
  auto priority = static_cast<uint16_t>(filter.integer("priority", 1, UINT16_MAX));
  auto handle = static_cast<uint32_t>(filter.integer("handle", 1, UINT32_MAX));
  std::string name = filter.text("name", 255);
  attach_filter(netns, ifindex, direction, program, priority, handle, name, filter.boolean("replace"));
  return info.Env().Undefined();
}

Napi::Value deleteFilter(const Info &info) {
  int netns = to_netns(info[0], "netns");
  uint32_t ifindex = to_ifindex(info[1], "ifindex");
  Direction direction = to_direction(info[2]);
  Fields filter(info[3], "filter");
  auto priority = static_cast<uint16_t>(filter.integer("priority", 1, UINT16_MAX));
  auto handle = static_cast<uint32_t>(filter.integer("handle", 1, UINT32_MAX));
  return boolean(info, delete_filter(netns, ifindex, direction, priority, handle));
}

// ---- sockets ----

Napi::Value listeners(const Info &info) {
  Napi::Env env = info.Env();
  return array_of(env, ambient::listeners(to_netns(info[0], "netns")), [&](const Listener &listener) {
    Napi::Object object = Napi::Object::New(env);
    object.Set("family", listener.family);
    object.Set("address", listener.address);
    object.Set("port", listener.port);
    object.Set("v6only", boolean(info, listener.v6only));
    object.Set("transparent", listener.transparent ? boolean(info, *listener.transparent) : env.Undefined());
    object.Set("uid", listener.uid);
    object.Set("inode", listener.inode);
    object.Set("mark", listener.mark ? number(info, *listener.mark) : env.Undefined());
    return object;
  });
}

const Name TCP_STATES[] = {{"established", 1}, {"syn_sent", 2},   {"syn_recv", 3}, {"fin_wait1", 4},
                           {"fin_wait2", 5},   {"time_wait", 6},  {"close", 7},    {"close_wait", 8},
                           {"last_ack", 9},    {"listen", 10},    {"closing", 11}, {"syn_recv", 12},
                           {nullptr, 0}};

Napi::Value connections(const Info &info) {
  Napi::Env env = info.Env();
  return array_of(env, ambient::connections(to_netns(info[0], "netns")), [&](const TcpConnection &connection) {
    Napi::Object object = Napi::Object::New(env);
    const char *state = word_of(TCP_STATES, connection.state);
    object.Set("state", state ? state : std::to_string(connection.state));
    object.Set("local", bytes_object(env, connection.local, 16));
    object.Set("localPort", connection.local_port);
    object.Set("remote", bytes_object(env, connection.remote, 16));
    object.Set("remotePort", connection.remote_port);
    return object;
  });
}

SocketAddress to_socket_address(const Fields &fields, const char *address_name, const char *port_name) {
  std::string text = fields.text(address_name, 64);
  auto address = socket_address(text, fields.port(port_name));
  if (!address) wrong_argument(fields.path(address_name), "an IP address, not \"" + text + "\"");
  return *address;
}

std::string endpoint_text(const Fields &fields, const char *address_name, const char *port_name) {
  return "[" + fields.text(address_name, 64) + "]:" + std::to_string(fields.port(port_name));
}

Napi::Value listenTransparent(const Info &info) {
  int netns = to_netns(info[0], "netns");
  Fields fields(info[1], "options");
  ListenOptions options = {};
  options.address = to_socket_address(fields, "address", "port");
  if (options.address.family() != to_family(fields.at("family"), fields.path("family"))) {
    wrong_argument(fields.path("address"), "of the family that options.family says");
  }
  options.backlog = static_cast<int>(fields.integer("backlog", 0, INT32_MAX));
  options.transparent = true;
  options.reuse_port = fields.boolean("reusePort");
  options.v6only = fields.boolean("v6only");
  options.mark = fields.u32("mark");
  std::string object = endpoint_text(fields, "address", "port") + " in " + netns_text(netns);
  return number(info, listen_in(netns, options, object));
}

Napi::Value listenPlain(const Info &info) {
  int netns = to_netns(info[0], "netns");
  Fields fields(info[1], "options");
  ListenOptions options = {};
  options.address = to_socket_address(fields, "address", "port");
  options.backlog = static_cast<int>(fields.integer("backlog", 0, INT32_MAX));
  options.reuse_port = fields.optional_boolean("reusePort");
  options.mark = fields.optional_u32("mark");
  std::string object = endpoint_text(fields, "address", "port") + " in " + netns_text(netns);
  return number(info, listen_in(netns, options, object));
}

Napi::Value listenDatagram(const Info &info) {
  int netns = to_netns(info[0], "netns");
  Fields fields(info[1], "options");
  ListenOptions options = {};
  options.address = to_socket_address(fields, "address", "port");
  options.reuse_port = fields.boolean("reusePort");
  options.mark = fields.u32("mark");
  std::string object = "UDP " + endpoint_text(fields, "address", "port") + " in " + netns_text(netns);
  return number(info, listen_datagram_in(netns, options, object));
}

Napi::Value connectTransparent(const Info &info) {
  int netns = to_netns(info[0], "netns");
  Fields fields(info[1], "options");
  ConnectOptions options = {};
  options.destination = to_socket_address(fields, "destination", "port");
  uint16_t source_port = fields.port("sourcePort");
  if (fields.at("source").IsNull()) {
    if (source_port) wrong_argument(fields.path("sourcePort"), "0 where source is null");
  } else {
    options.source = to_socket_address(fields, "source", "sourcePort");
    if (options.source->family() != options.destination.family()) {
      wrong_argument(fields.path("source"), "of the destination's family");
    }
  }
  options.mark = fields.u32("mark");
  auto timeout_ms = static_cast<uint32_t>(fields.integer("timeoutMs", 1, INT32_MAX));
  std::string object = endpoint_text(fields, "destination", "port") + " from " + netns_text(netns);
  Fd socket;
  try {
    socket = begin_connect(netns, options, object);
  } catch (const KernelError &error) {
    auto deferred = Napi::Promise::Deferred::New(info.Env());
    deferred.Reject(error_value(info.Env(), error));
    return deferred.Promise();
  }
  return await_connection(info.Env(), std::move(socket), object, timeout_ms);
}

// ---- datagrams between processes ----

std::string to_socket_path(Napi::Value value) {
  std::string path = to_text(value, "path", SOCKET_PATH_LIMIT);
  if (path.empty()) wrong_argument("path", "a path, not an empty string");
  return path;
}

Napi::Value listenSeqpacket(const Info &info) {
  std::string path = to_socket_path(info[0]);
  Fields fields(info[1], "options");
  auto mode = static_cast<mode_t>(fields.integer("mode", 0, 0777));
  auto backlog = static_cast<int>(fields.integer("backlog", 0, INT32_MAX));
  return number(info, listen_seqpacket(path, mode, backlog).release());
}

Napi::Value acceptSeqpacket(const Info &info) {
  auto accepted = accept_seqpacket(to_fd(info[0], "listener"));
  return accepted ? number(info, accepted->release()) : info.Env().Null();
}

Napi::Value connectSeqpacket(const Info &info) {
  return number(info, connect_seqpacket(to_socket_path(info[0])).release());
}

Napi::Value peerCredentials(const Info &info) {
  PeerCredentials found = peer_credentials(to_fd(info[0], "socket"));
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("pid", found.pid);
  object.Set("uid", found.uid);
  object.Set("gid", found.gid);
  return object;
}

Napi::Value sendDatagram(const Info &info) {
  int socket = to_fd(info[0], "socket");
  if (!info[1].IsTypedArray() || info[1].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    wrong_argument("bytes", "a Uint8Array");
  }
  auto bytes = info[1].As<Napi::Uint8Array>();
  std::vector<int> descriptors;
  for (const Napi::Value &value : to_array(info[2], "fds", 253)) {
    descriptors.push_back(to_fd(value, "fds[" + std::to_string(descriptors.size()) + "]"));
  }
  return boolean(info, send_datagram(socket, bytes.Data(), bytes.ByteLength(), descriptors));
}

Napi::Value receiveDatagram(const Info &info) {
  Napi::Env env = info.Env();
  Datagram datagram = receive_datagram(to_fd(info[0], "socket"));
  if (datagram.kind == Datagram::nothing) return Napi::String::New(env, "nothing");
  if (datagram.kind == Datagram::closed) return Napi::String::New(env, "closed");
  Napi::Object object = Napi::Object::New(env);
  object.Set("bytes", bytes_object(env, datagram.bytes.data(), datagram.bytes.size()));
  object.Set("fds", array_of(env, datagram.descriptors, [&](const Fd &fd) { return number(info, fd.get()); }));
  object.Set("truncated", boolean(info, datagram.truncated));
  // Only now, when nothing can fail any more, are they the caller's.
  for (Fd &fd : datagram.descriptors) fd.release();
  return object;
}

Napi::Value openLinkEvents(const Info &info) { return number(info, open_link_events().release()); }

Napi::Value readLinkEvents(const Info &info) {
  auto found = read_link_events(to_fd(info[0], "socket"));
  if (!found) return info.Env().Null();
  return array_of(info.Env(), *found, [&](uint32_t ifindex) { return number(info, ifindex); });
}

Napi::Value watchReadable(const Info &info) {
  int fd = to_fd(info[0], "fd");
  if (!info[1].IsFunction()) wrong_argument("onReadable", "a function");
  return watch_readable(info.Env(), fd, info[1].As<Napi::Function>());
}

// ---- keys ----

Napi::Value sha256(const Info &info) {
  if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    wrong_argument("bytes", "a Uint8Array");
  }
  auto bytes = info[0].As<Napi::Uint8Array>();
  return Napi::String::New(info.Env(), sha256_hex(bytes.Data(), bytes.ByteLength()));
}

// ---- kernel ----

Napi::Value features(const Info &info) {
  const Features &found = ambient::features();
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("tcx", boolean(info, found.tcx));
  object.Set("redirectPeer", boolean(info, found.redirect_peer));
  object.Set("skAssign", boolean(info, found.sk_assign));
  object.Set("skLookup", boolean(info, found.sk_lookup));
  object.Set("skcLookup", boolean(info, found.skc_lookup));
  object.Set("checkMtu", boolean(info, found.check_mtu));
  object.Set("tcpCheckSyncookie", boolean(info, found.tcp_check_syncookie));
  object.Set("netnsCookie", boolean(info, found.netns_cookie));
  object.Set("btf", boolean(info, found.btf));
  return object;
}

#ifdef AMBIENT_FAULTS
Napi::Value failKernelCall(const Info &info) {
  auto n = static_cast<unsigned long>(to_integer(info[0], "n", 0, INT32_MAX));
  set_fault(n, static_cast<int>(to_integer(info[1], "errno", n ? 1 : 0, 4095)));
  return info.Env().Undefined();
}

Napi::Value kernelCalls(const Info &info) {
  return array_of(info.Env(), kernel_calls(),
                  [&](const std::string &name) { return Napi::String::New(info.Env(), name); });
}
#endif

// ---- exports ----

template <const Name *names>
Napi::Value name_table(const Info &info) {
  Napi::Object object = Napi::Object::New(info.Env());
  for (const Name *name = names; name->word; name++) object.Set(name->word, name->number);
  object.Freeze();
  return object;
}

struct Export {
  const char *name;
  Napi::Value (*callback)(const Info &);
};

#define EXPORT(name) \
  { #name, guarded<name> }
const Export FUNCTIONS[] = {
    EXPORT(close),
    EXPORT(openNetns),
    EXPORT(netnsIdentity),
    EXPORT(netnsId),
    EXPORT(lockFile),
    EXPORT(lockShared),
    EXPORT(isBpffs),
    EXPORT(mountBpffs),
    EXPORT(makeDirectory),
    EXPORT(removeDirectory),
    EXPORT(removeFile),
    EXPORT(renameFile),
    {"capabilities", guarded<&capabilities>},
    EXPORT(linkByName),
    EXPORT(linkByIndex),
    EXPORT(linkAddresses),
    EXPORT(acceptLocal),
    EXPORT(setAcceptLocal),
    EXPORT(migrateRequests),
    EXPORT(setMigrateRequests),
    EXPORT(routeLocalnet),
    EXPORT(setRouteLocalnet),
    EXPORT(qdiscs),
    EXPORT(addRule),
    EXPORT(deleteRule),
    EXPORT(rules),
    EXPORT(addLocalRoute),
    EXPORT(deleteLocalRoute),
    EXPORT(localRoutes),
    EXPORT(createState),
    EXPORT(openState),
    EXPORT(openStateOver),
    EXPORT(growState),
    EXPORT(copyRecords),
    EXPORT(copyFlows),
    EXPORT(copyTraffic),
    EXPORT(writeCapacity),
    EXPORT(closeState),
    EXPORT(settings),
    EXPORT(getAttachment),
    EXPORT(putAttachment),
    EXPORT(replaceAttachment),
    EXPORT(deleteAttachment),
    EXPORT(listAttachments),
    EXPORT(getInterface),
    EXPORT(putInterface),
    EXPORT(deleteInterface),
    EXPORT(listInterfaces),
    EXPORT(getEndpoint),
    EXPORT(putEndpoint),
    EXPORT(deleteEndpoint),
    EXPORT(listEndpoints),
    EXPORT(getProxies),
    EXPORT(putProxies),
    EXPORT(directFlows),
    EXPORT(importDirectFlow),
    EXPORT(deleteDirectFlows),
    EXPORT(deleteFlows),
    EXPORT(listDirectFlows),
    EXPORT(putExclusions),
    EXPORT(deleteExclusions),
    EXPORT(getExclusions),
    EXPORT(listExclusions),
    EXPORT(setCheckCgroups),
    EXPORT(putProxyCgroup),
    EXPORT(deleteProxyCgroup),
    EXPORT(listProxyCgroups),
    EXPORT(counters),
    EXPORT(deleteCounters),
    EXPORT(setTrace),
    EXPORT(getTrace),
    EXPORT(followEvents),
    EXPORT(mapUsage),
    EXPORT(loadPrograms),
    EXPORT(loadIdlePrograms),
    EXPORT(jumpToPrograms),
    EXPORT(waitForPrograms),
    EXPORT(loadStub),
    EXPORT(jumpTarget),
    EXPORT(openProgram),
    EXPORT(programInfo),
    EXPORT(programById),
    EXPORT(testRun),
    EXPORT(attachTcx),
    EXPORT(attachTcxAside),
    EXPORT(attachLookup),
    EXPORT(queryTcx),
    EXPORT(linkInfo),
    EXPORT(updateLink),
    EXPORT(detachLink),
    EXPORT(detachLinkAside),
    EXPORT(addClsact),
    EXPORT(filters),
    EXPORT(attachFilter),
    EXPORT(deleteFilter),
    EXPORT(listeners),
    EXPORT(connections),
    EXPORT(listenTransparent),
    EXPORT(connectTransparent),
    EXPORT(listenPlain),
    EXPORT(listenDatagram),
    EXPORT(listenSeqpacket),
    EXPORT(acceptSeqpacket),
    EXPORT(connectSeqpacket),
    EXPORT(peerCredentials),
    EXPORT(sendDatagram),
    EXPORT(receiveDatagram),
    EXPORT(openLinkEvents),
    EXPORT(readLinkEvents),
    EXPORT(watchReadable),
    EXPORT(sha256),
    EXPORT(features),
#ifdef AMBIENT_FAULTS
    EXPORT(failKernelCall),
    EXPORT(kernelCalls),
#endif
};
#undef EXPORT

napi_value call_export(napi_env env, napi_callback_info info) {
  // What Napi::Function::New does, without an allocation for each of the exports.
  return Napi::details::WrapCallback(env, [&] {
    Info callback_info(env, info);
    auto *exported = static_cast<const Export *>(callback_info.Data());
    callback_info.SetData(const_cast<char *>(exported->name));
    return static_cast<napi_value>(exported->callback(callback_info));
  });
}

template <Napi::Value (*getter)(const Info &)>
napi_value call_getter(napi_env env, napi_callback_info info) {
  return Napi::details::WrapCallback(env, [&] { return static_cast<napi_value>(getter(Info(env, info))); });
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
#ifdef AMBIENT_FAULTS
  read_fault_environment();
#endif
  // libbpf writes warnings to stderr unless told otherwise; programs.cc collects them when they matter.
  libbpf_set_print(nullptr);

  napi_add_env_cleanup_hook(
      env, [](void *) { join_background(); }, nullptr);

  std::vector<napi_property_descriptor> properties;
  properties.reserve(std::size(FUNCTIONS) + 8);
  for (const Export &exported : FUNCTIONS) {
    napi_property_descriptor property = {};
    property.utf8name = exported.name;
    property.method = call_export;
    property.data = const_cast<Export *>(&exported);
    property.attributes = napi_enumerable;
    properties.push_back(property);
  }
  auto getter = [&](const char *name, napi_callback callback) {
    napi_property_descriptor property = {};
    property.utf8name = name;
    property.getter = callback;
    property.attributes = napi_enumerable;
    properties.push_back(property);
  };
  getter("reasons", call_getter<name_table<REASONS>>);
  getter("programs", call_getter<name_table<PROGRAMS>>);
  getter("sizes", call_getter<name_table<SIZES>>);
  getter("flags", call_getter<name_table<FLAGS>>);
  napi_status status = napi_define_properties(env, exports, properties.size(), properties.data());
  if (status != napi_ok) throw Napi::Error::New(env);
  exports.Set("layoutVersion", LAYOUT_VERSION);
  exports.Set("objectId", object_id());
  InitTopology(env, exports);
  return exports;
}

NODE_API_MODULE(ambient_redirect, init)

}  // namespace
}  // namespace ambient
