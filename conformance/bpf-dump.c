/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What bpf(2) knows, one "key<TAB>value" a line, for comparing the kernel before and after a test:
 *
 *   bpf-dump tcx          every TCX program of every interface of this network namespace, in order
 *   bpf-dump pins DIR...  every object pinned below DIR: programs, links, maps with their entries
 *
 * Object ids are left out (they differ from load to load); a program is named by name and tag.
 * Numbers of Linux 6.6 and later that Debian 12's headers lack are written out.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <ftw.h>
#include <linux/bpf.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TCX_INGRESS 46
#define TCX_EGRESS 47
#define LINK_TYPE_TCX 11

/* The query part of union bpf_attr as of Linux 6.6. */
struct query {
	__u32 ifindex;
	__u32 attach_type;
	__u32 query_flags;
	__u32 attach_flags;
	__aligned_u64 prog_ids;
	__u32 count;
	__u32 pad;
	__aligned_u64 prog_attach_flags;
	__aligned_u64 link_ids;
	__aligned_u64 link_attach_flags;
	__u64 revision;
};

static long bpf(int cmd, void *attr, unsigned int size)
{
	return syscall(__NR_bpf, cmd, attr, size);
}

static int info(int fd, void *out, __u32 size)
{
	union bpf_attr attr = {};

	memset(out, 0, size);
	attr.info.bpf_fd = fd;
	attr.info.info_len = size;
	attr.info.info = (__u64)(unsigned long)out;
	return (int)bpf(BPF_OBJ_GET_INFO_BY_FD, &attr, sizeof(attr));
}

static void print_hex(const unsigned char *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++)
		printf("%02x", bytes[i]);
}

static void print_program(__u32 id)
{
	union bpf_attr attr = {};
	struct bpf_prog_info program;
	int fd;

	attr.prog_id = id;
	fd = (int)bpf(BPF_PROG_GET_FD_BY_ID, &attr, sizeof(attr));
	if (fd < 0 || info(fd, &program, sizeof(program))) {
		printf("program gone (%s)", strerror(errno));
	} else {
		printf("program %s type %u tag ", program.name, program.type);
		print_hex(program.tag, sizeof(program.tag));
	}
	if (fd >= 0)
		close(fd);
}

static int dump_tcx(void)
{
	static const struct {
		__u32 type;
		const char *name;
	} hooks[] = { { TCX_INGRESS, "ingress" }, { TCX_EGRESS, "egress" } };
	struct if_nameindex *links = if_nameindex();

	if (!links) {
		perror("if_nameindex");
		return 1;
	}
	for (struct if_nameindex *link = links; link->if_index; link++) {
		for (size_t hook = 0; hook < 2; hook++) {
			__u32 programs[64] = {}, by_link[64] = {};
			struct query query = {
				.ifindex = link->if_index,
				.attach_type = hooks[hook].type,
				.prog_ids = (__u64)(unsigned long)programs,
				.link_ids = (__u64)(unsigned long)by_link,
				.count = 64,
			};

			if (bpf(BPF_PROG_QUERY, &query, sizeof(query))) {
				/* EINVAL: a kernel before 6.6. ENODEV: the interface went meanwhile. */
				if (errno == EINVAL || errno == ENODEV || errno == ENOENT)
					continue;
				fprintf(stderr, "query %s %s: %s\n", link->if_name, hooks[hook].name, strerror(errno));
				return 1;
			}
			for (__u32 i = 0; i < query.count; i++) {
				printf("%s %s %u\t%s, ", link->if_name, hooks[hook].name, i,
				       by_link[i] ? "by link" : "without link");
				print_program(programs[i]);
				printf("\n");
			}
		}
	}
	if_freenameindex(links);
	return 0;
}

static int possible_cpus(void)
{
	FILE *file = fopen("/sys/devices/system/cpu/possible", "r");
	int first = 0, last = 0;

	if (!file || fscanf(file, "%d-%d", &first, &last) < 1)
		last = 0;
	if (file)
		fclose(file);
	return last + 1;
}

static int per_cpu(__u32 type)
{
	return type == BPF_MAP_TYPE_PERCPU_HASH || type == BPF_MAP_TYPE_PERCPU_ARRAY ||
	       type == BPF_MAP_TYPE_LRU_PERCPU_HASH;
}

static int map_of_maps(__u32 type)
{
	return type == BPF_MAP_TYPE_ARRAY_OF_MAPS || type == BPF_MAP_TYPE_HASH_OF_MAPS;
}

/* An inner map is named by its id, which differs from map to map: print what it is instead. */
static void print_inner_map(__u32 id)
{
	union bpf_attr attr = {};
	struct bpf_map_info map;
	int fd;

	attr.map_id = id;
	fd = (int)bpf(BPF_MAP_GET_FD_BY_ID, &attr, sizeof(attr));
	if (fd < 0 || info(fd, &map, sizeof(map)))
		printf("inner map gone (%s)", strerror(errno));
	else
		printf("inner map %s type %u key %u value %u max %u", map.name, map.type, map.key_size, map.value_size,
		       map.max_entries);
	if (fd >= 0)
		close(fd);
}

/* Entries of an array that are all zero were never written, or were cleared: no difference. */
static int all_zero(const unsigned char *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++)
		if (bytes[i])
			return 0;
	return 1;
}

static void dump_map(const char *path, int fd)
{
	struct bpf_map_info map;
	unsigned char *key, *next, *value;
	size_t size;
	int started = 0;

	if (info(fd, &map, sizeof(map))) {
		printf("%s\tmap: %s\n", path, strerror(errno));
		return;
	}
	printf("%s\tmap %s type %u key %u value %u max %u flags %#x\n", path, map.name, map.type, map.key_size,
	       map.value_size, map.max_entries, map.map_flags);
	if (!map.key_size || map.type == BPF_MAP_TYPE_RINGBUF || map.type == BPF_MAP_TYPE_PERF_EVENT_ARRAY)
		return;
	size = per_cpu(map.type) ? (size_t)possible_cpus() * ((map.value_size + 7) & ~7u) : map.value_size;
	key = calloc(1, map.key_size);
	next = calloc(1, map.key_size);
	value = calloc(1, size + 8);
	for (;;) {
		union bpf_attr attr = {};

		attr.map_fd = fd;
		attr.key = started ? (__u64)(unsigned long)key : 0;
		attr.next_key = (__u64)(unsigned long)next;
		if (bpf(BPF_MAP_GET_NEXT_KEY, &attr, sizeof(attr)))
			break;
		started = 1;
		memcpy(key, next, map.key_size);
		memset(&attr, 0, sizeof(attr));
		attr.map_fd = fd;
		attr.key = (__u64)(unsigned long)key;
		attr.value = (__u64)(unsigned long)value;
		if (bpf(BPF_MAP_LOOKUP_ELEM, &attr, sizeof(attr)))
			continue;
		if ((map.type == BPF_MAP_TYPE_ARRAY || map.type == BPF_MAP_TYPE_PERCPU_ARRAY) && all_zero(value, size))
			continue;
		printf("%s[", path);
		print_hex(key, map.key_size);
		printf("]\t");
		if (map_of_maps(map.type))
			print_inner_map(*(__u32 *)value);
		else
			print_hex(value, size);
		printf("\n");
	}
	free(key);
	free(next);
	free(value);
}

static void dump_link(const char *path, int fd)
{
	struct bpf_link_info link;
	char name[IF_NAMESIZE] = "?";
	__u32 words[sizeof(link) / sizeof(__u32)];

	if (info(fd, &link, sizeof(link))) {
		printf("%s\tlink: %s\n", path, strerror(errno));
		return;
	}
	printf("%s\tlink type %u, ", path, link.type);
	if (link.type == LINK_TYPE_TCX) {
		/* struct bpf_link_info.tcx: ifindex and attach type follow type, id, prog_id and padding. */
		memcpy(words, &link, sizeof(words));
		printf("ifindex %u (%s) attach type %u, ", words[4], words[4] ? if_indextoname(words[4], name) ?: "elsewhere" : "detached",
		       words[5]);
	}
	print_program(link.prog_id);
	printf("\n");
}

static int dump_pin(const char *path, const struct stat *stat, int flag, struct FTW *walk)
{
	union bpf_attr attr = {};
	char fd_path[32], target[64] = {};
	int fd;

	(void)stat;
	/* The two iterators that every bpffs mount has. */
	if (!strcmp(path + walk->base, "maps.debug") || !strcmp(path + walk->base, "progs.debug"))
		return 0;
	if (flag == FTW_D) {
		printf("%s/\tdirectory\n", path);
		return 0;
	}
	attr.pathname = (__u64)(unsigned long)path;
	fd = (int)bpf(BPF_OBJ_GET, &attr, sizeof(attr));
	if (fd < 0) {
		printf("%s\t%s\n", path, errno == EACCES ? "not a BPF object" : strerror(errno));
		return 0;
	}
	snprintf(fd_path, sizeof(fd_path), "/proc/self/fd/%d", fd);
	if (readlink(fd_path, target, sizeof(target) - 1) < 0)
		target[0] = 0;
	if (strstr(target, "bpf-map")) {
		dump_map(path, fd);
	} else if (strstr(target, "bpf-prog")) {
		struct bpf_prog_info program;

		if (info(fd, &program, sizeof(program)) == 0) {
			printf("%s\t", path);
			print_program(program.id);
			printf("\n");
		}
	} else {
		dump_link(path, fd);
	}
	close(fd);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "tcx"))
		return dump_tcx();
	if (argc > 2 && !strcmp(argv[1], "pins")) {
		for (int i = 2; i < argc; i++)
			if (nftw(argv[i], dump_pin, 16, FTW_PHYS)) {
				perror(argv[i]);
				return 1;
			}
		return 0;
	}
	fprintf(stderr, "usage: bpf-dump tcx | bpf-dump pins DIR...\n");
	return 2;
}
