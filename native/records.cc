// SPDX-License-Identifier: Apache-2.0
#include "records.h"

#include <cstring>

#include "arguments.h"
#include "error.h"
#include "link.h"
#include "names.h"
#include "state.h"
#include "tc.h"

namespace ambient {

namespace {

const Name DIRECTIONS[] = {{"ingress", 0}, {"egress", 1}, {nullptr, 0}};

Napi::Value text(Napi::Env env, const char *data, size_t size) {
  return Napi::String::New(env, data, strnlen(data, size));
}

Napi::Value word(Napi::Env env, const Name *names, uint32_t number, const char *field) {
  const char *found = word_of(names, number);
  if (!found) throw KernelError(EPROTO, "bpf(BPF_MAP_LOOKUP_ELEM)", std::string(field) + " is " + std::to_string(number));
  return Napi::String::New(env, found);
}

Napi::Object hook_object(Napi::Env env, const struct hook_record &hook) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("program", word(env, PROGRAMS, hook.program, "hook.program"));
  object.Set("kind", word(env, HOOK_KINDS, hook.kind, "hook.kind"));
  object.Set("ifindex", hook.ifindex);
  object.Set("direction", word(env, DIRECTIONS, hook.egress, "hook.egress"));
  object.Set("inNetns", Napi::Boolean::New(env, hook.in_netns));
  object.Set("programId", hook.program_id);
  object.Set("handle", hook.handle);
  object.Set("priority", hook.priority);
  return object;
}

struct hook_record to_hook(Napi::Value value, const std::string &path) {
  Fields fields(value, path);
  struct hook_record hook = {};
  hook.program = fields.word("program", PROGRAMS);
  hook.kind = fields.word("kind", HOOK_KINDS);
  hook.ifindex = fields.u32("ifindex");
  hook.egress = fields.word("direction", DIRECTIONS);
  hook.in_netns = fields.boolean("inNetns");
  hook.program_id = fields.u32("programId");
  hook.handle = fields.u32("handle");
  hook.priority = fields.u32("priority");
  return hook;
}

// Of a struct that has the four.
template <typename Record>
Napi::Object ports_object(Napi::Env env, const Record &record) {
  Napi::Object ports = Napi::Object::New(env);
  ports.Set("outbound", record.outbound);
  ports.Set("inboundPlaintext", record.inbound_plaintext);
  ports.Set("inboundHBONE", record.inbound_hbone);
  ports.Set("dns", record.dns);
  return ports;
}

template <typename Record>
void to_ports(const Fields &ports, Record &record) {
  record.outbound = ports.port("outbound");
  record.inbound_plaintext = ports.port("inboundPlaintext");
  record.inbound_hbone = ports.port("inboundHBONE");
  record.dns = ports.port("dns");
}

Napi::Object proxy_object(Napi::Env env, const struct proxy &proxy) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("key", bytes_object(env, proxy.key, sizeof(proxy.key)));
  object.Set("netnsCookie", Napi::BigInt::New(env, static_cast<uint64_t>(proxy.netns_cookie)));
  object.Set("netnsIno", Napi::BigInt::New(env, static_cast<uint64_t>(proxy.netns_ino)));
  object.Set("hostIfindex", proxy.host_ifindex);
  object.Set("podIfindex", proxy.pod_ifindex);
  object.Set("nsid", proxy.nsid);
  object.Set("master", proxy.master);
  object.Set("mac", mac_text(proxy.mac));
  object.Set("ports", ports_object(env, proxy));
  return object;
}

struct proxy to_proxy(Napi::Value value, const std::string &path) {
  Fields fields(value, path);
  struct proxy proxy = {};
  fields.bytes("key", proxy.key, sizeof(proxy.key));
  proxy.netns_cookie = fields.u64("netnsCookie");
  proxy.netns_ino = fields.u64("netnsIno");
  proxy.host_ifindex = fields.u32("hostIfindex");
  proxy.pod_ifindex = fields.u32("podIfindex");
  proxy.nsid = fields.nsid("nsid");
  proxy.master = fields.u32("master");
  fields.mac("mac", proxy.mac);
  to_ports(fields.object("ports"), proxy);
  return proxy;
}

}  // namespace

Napi::Object bytes_object(Napi::Env env, const void *data, size_t size) {
  Napi::Uint8Array array = Napi::Uint8Array::New(env, size);
  memcpy(array.Data(), data, size);
  return array;
}

Napi::Object to_object(Napi::Env env, const struct settings &settings) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("layout", settings.layout);
  object.Set("maxPods", settings.max_pods);
  object.Set("maxFlows", settings.max_flows);
  object.Set("directFlowsPerPod", settings.direct_flows);
  Napi::Object marks = Napi::Object::New(env);
  marks.Set("bypass", settings.mark_bypass);
  marks.Set("toProxy", settings.mark_to_proxy);
  marks.Set("tproxy", settings.mark_tproxy);
  object.Set("marks", marks);
  object.Set("variant", settings.variant);
  object.Set("sign", bytes_object(env, settings.sign, sizeof(settings.sign)));
  object.Set("bootId", boot_id_text(settings.boot_id));
  object.Set("checkCgroups", Napi::Boolean::New(env, settings.check_cgroups));
  return object;
}

Napi::Object to_object(Napi::Env env, const struct interface &record) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("podMac", mac_text(record.pod_mac));
  object.Set("gatewayMac", mac_text(record.gateway_mac));
  object.Set("flags", record.flags);
  object.Set("podIfindex", record.pod_ifindex);
  object.Set("nsid", record.nsid);
  object.Set("master", record.master);
  object.Set("ports", ports_object(env, record));
  object.Set("address4", bytes_object(env, record.address4, sizeof(record.address4)));
  object.Set("address6", bytes_object(env, record.address6, sizeof(record.address6)));
  return object;
}

struct interface to_interface(Napi::Value value, const std::string &path) {
  Fields fields(value, path);
  struct interface record = {};
  fields.mac("podMac", record.pod_mac);
  fields.mac("gatewayMac", record.gateway_mac);
  record.flags = fields.u32("flags");
  record.pod_ifindex = fields.u32("podIfindex");
  record.nsid = fields.nsid("nsid");
  record.master = fields.u32("master");
  to_ports(fields.object("ports"), record);
  fields.bytes("address4", record.address4, sizeof(record.address4));
  fields.bytes("address6", record.address6, sizeof(record.address6));
  return record;
}

Napi::Object to_object(Napi::Env env, const struct endpoint &record) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("ifindex", record.ifindex);
  object.Set("flags", record.flags);
  object.Set("podMac", mac_text(record.pod_mac));
  return object;
}

struct endpoint to_endpoint(Napi::Value value, const std::string &path) {
  Fields fields(value, path);
  struct endpoint record = {};
  record.ifindex = fields.u32("ifindex");
  record.flags = fields.u32("flags");
  fields.mac("podMac", record.pod_mac);
  return record;
}

Napi::Object to_object(Napi::Env env, const struct proxies &record) {
  if (record.count > PROXY_SLOTS) {
    throw KernelError(EPROTO, "bpf(BPF_MAP_LOOKUP_ELEM)", "proxies.count is " + std::to_string(record.count));
  }
  Napi::Object object = Napi::Object::New(env);
  object.Set("generation", record.generation);
  Napi::Array proxies = Napi::Array::New(env, record.count);
  for (uint32_t i = 0; i < record.count; i++) proxies.Set(i, proxy_object(env, record.slot[i]));
  object.Set("proxies", proxies);
  return object;
}

struct proxies to_proxies(Napi::Value generation, Napi::Value proxies) {
  struct proxies record = {};
  record.generation = to_u32(generation, "generation");
  for (const Napi::Value &value : to_array(proxies, "proxies", PROXY_SLOTS)) {
    record.slot[record.count] = to_proxy(value, "proxies[" + std::to_string(record.count) + "]");
    record.count++;
  }
  return record;
}

Napi::Object to_object(Napi::Env env, const struct attachment &record) {
  if (record.address_count > MAX_ADDRESSES) {
    throw KernelError(EPROTO, "bpf(BPF_MAP_LOOKUP_ELEM)",
                      "attachment.address_count is " + std::to_string(record.address_count));
  }
  Napi::Object object = Napi::Object::New(env);
  object.Set("layout", record.layout);
  object.Set("state", word(env, ATTACHMENT_STATES, record.state, "attachment.state"));
  object.Set("role", word(env, ROLES, record.role, "attachment.role"));
  object.Set("contract", word(env, CONTRACTS, record.contract, "attachment.contract"));
  object.Set("flags", record.flags);
  object.Set("hostIfindex", record.host_ifindex);
  object.Set("podIfindex", record.pod_ifindex);
  object.Set("nsid", record.nsid);
  object.Set("interfaceId", record.interface_id);
  Napi::Object netns = Napi::Object::New(env);
  netns.Set("dev", Napi::BigInt::New(env, static_cast<uint64_t>(record.netns_dev)));
  netns.Set("ino", Napi::BigInt::New(env, static_cast<uint64_t>(record.netns_ino)));
  netns.Set("cookie", Napi::BigInt::New(env, static_cast<uint64_t>(record.netns_cookie)));
  object.Set("netns", netns);
  object.Set("enrolledAt", static_cast<double>(record.enrolled_at));
  object.Set("podMac", mac_text(record.pod_mac));
  object.Set("hostMac", mac_text(record.host_mac));
  object.Set("bootId", boot_id_text(record.boot_id));
  Napi::Array addresses = Napi::Array::New(env, record.address_count);
  for (uint32_t i = 0; i < record.address_count; i++) addresses.Set(i, bytes_object(env, record.addresses[i], 16));
  object.Set("addresses", addresses);
  Napi::Array hooks = Napi::Array::New(env);
  for (const struct hook_record &hook : record.hooks) {
    if (hook.program) hooks.Set(hooks.Length(), hook_object(env, hook));
  }
  object.Set("hooks", hooks);
  object.Set("programTag", text(env, record.program_tag, sizeof(record.program_tag)));
  object.Set("hostIfname", text(env, record.host_ifname, sizeof(record.host_ifname)));
  object.Set("ifname", text(env, record.ifname, sizeof(record.ifname)));
  object.Set("network", text(env, record.network, sizeof(record.network)));
  object.Set("containerId", text(env, record.container_id, sizeof(record.container_id)));
  object.Set("podName", text(env, record.pod_name, sizeof(record.pod_name)));
  object.Set("podNamespace", text(env, record.pod_namespace, sizeof(record.pod_namespace)));
  object.Set("podUid", text(env, record.pod_uid, sizeof(record.pod_uid)));
  object.Set("serviceAccount", text(env, record.service_account, sizeof(record.service_account)));
  object.Set("netnsPath", text(env, record.netns_path, sizeof(record.netns_path)));
  return object;
}

struct attachment to_attachment(Napi::Value value, const std::string &path) {
  Fields fields(value, path);
  struct attachment record = {};
  record.layout = fields.u32("layout");
  record.state = fields.word("state", ATTACHMENT_STATES);
  record.role = fields.word("role", ROLES);
  record.contract = fields.word("contract", CONTRACTS);
  record.flags = fields.u32("flags");
  record.host_ifindex = fields.u32("hostIfindex");
  record.pod_ifindex = fields.u32("podIfindex");
  record.nsid = fields.nsid("nsid");
  record.interface_id = fields.u32("interfaceId");
  Fields netns = fields.object("netns");
  record.netns_dev = netns.u64("dev");
  record.netns_ino = netns.u64("ino");
  record.netns_cookie = netns.u64("cookie");
  record.enrolled_at = static_cast<uint64_t>(fields.integer("enrolledAt", 0, 1ll << 53));
  fields.mac("podMac", record.pod_mac);
  fields.mac("hostMac", record.host_mac);
  if (!parse_boot_id(fields.text("bootId", 36), record.boot_id)) {
    wrong_argument(fields.path("bootId"), "a boot id as in /proc/sys/kernel/random/boot_id");
  }
  for (const Napi::Value &address : fields.array("addresses", MAX_ADDRESSES)) {
    to_bytes(address, fields.path("addresses") + "[" + std::to_string(record.address_count) + "]",
             record.addresses[record.address_count], 16);
    record.address_count++;
  }
  size_t hooks = 0;
  for (const Napi::Value &hook : fields.array("hooks", MAX_HOOKS)) {
    record.hooks[hooks] = to_hook(hook, fields.path("hooks") + "[" + std::to_string(hooks) + "]");
    hooks++;
  }
  fields.text("programTag", record.program_tag, sizeof(record.program_tag));
  fields.text("hostIfname", record.host_ifname, sizeof(record.host_ifname));
  fields.text("ifname", record.ifname, sizeof(record.ifname));
  fields.text("network", record.network, sizeof(record.network));
  fields.text("containerId", record.container_id, sizeof(record.container_id));
  fields.text("podName", record.pod_name, sizeof(record.pod_name));
  fields.text("podNamespace", record.pod_namespace, sizeof(record.pod_namespace));
  fields.text("podUid", record.pod_uid, sizeof(record.pod_uid));
  fields.text("serviceAccount", record.service_account, sizeof(record.service_account));
  fields.text("netnsPath", record.netns_path, sizeof(record.netns_path));
  return record;
}

}  // namespace ambient
