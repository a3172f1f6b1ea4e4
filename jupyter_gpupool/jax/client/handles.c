/* The part of the PJRT plugin that must not enter Python.

XLA destroys buffers and events while a Python exception is pending, waits for events in threads of its own, and
calls the table of functions once more after the interpreter has ended. What it calls then is here: handles, getters
that read a handle's fields, events and errors. Python makes handles, and fills the other places of the table.

The arguments' structures are those of the public PJRT C API, as far as they are used here; see layouts.py. */

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

/* -- errors */

struct error {
  void *functions; /* of PJRT's; 0: none, which XLA looks for in every handle */
  int32_t code;
  bool is_static;
  size_t size;
  const char *text;
  char copied[];
};

#define STATIC_ERROR(name, code, text) static struct error name = {NULL, code, true, sizeof text - 1, text, {}};

STATIC_ERROR(out_of_host_memory, 8, "this process has no memory left")
STATIC_ERROR(unimplemented, 12, "this is not supported on a slice of jupyter_gpupool yet")
STATIC_ERROR(no_address, 12,
             "an array of a slice has no address in this process, so DLPack cannot lend it; copy it first, by "
             "numpy.asarray(x) or jax.device_put(x, jax.devices(\"cpu\")[0])")
STATIC_ERROR(not_stored, 12,
             "a compiled program of a slice stays with its worker, so the persistent compilation cache has none of it")
STATIC_ERROR(ended, 14, "the process ends, and its session with the worker has ended")

/* A new error; code 0 is none. */
PUBLIC struct error *gpupool_error(int32_t code, const char *text, size_t size) {
  if (!code) return NULL;
  struct error *e = malloc(sizeof *e + size);
  if (!e) return &out_of_host_memory;
  *e = (struct error){NULL, code, false, size, e->copied};
  memcpy(e->copied, text, size);
  return e;
}

struct error_args {
  size_t struct_size;
  void *extension;
  struct error *error;
  union {
    struct {
      const char *text;
      size_t size;
    } message;
    int32_t code;
  } out;
};

PUBLIC void gpupool_error_destroy(struct error_args *args) {
  if (args->error && !args->error->is_static) free(args->error);
}

PUBLIC void gpupool_error_message(struct error_args *args) {
  args->out.message.text = args->error->text;
  args->out.message.size = args->error->size;
}

PUBLIC void *gpupool_error_code(struct error_args *args) {
  args->out.code = args->error->code;
  return NULL;
}

/* What fills the places of the table that nothing else fills; what Python filled, once the session has ended; and
   everything, once the interpreter ends. */

PUBLIC void *gpupool_unimplemented(void *args) {
  (void)args;
  return &unimplemented;
}

PUBLIC void *gpupool_no_address(void *args) {
  (void)args;
  return &no_address;
}

PUBLIC void *gpupool_not_stored(void *args) {
  (void)args;
  return &not_stored;
}

PUBLIC void *gpupool_ended(void *args) {
  (void)args;
  return &ended;
}

PUBLIC void *gpupool_nothing(void *args) {
  (void)args;
  return NULL;
}

/* -- handles: buffers, executables, and what lives as long as the process */

struct handle {
  void *functions;
  struct handle *next;
  int64_t id;
  int32_t element_type;
  int32_t is_deleted;
  size_t rank;
  size_t nbytes;
  void *device;
  void *memory;
  int64_t *dims;
  int64_t *minor_to_major;
  size_t users; /* who destroys it once more; a program's handle serves XLA for the loaded program, too */
  const struct program *program;
  int64_t numbers[]; /* of dims, then of minor_to_major */
};

static struct handle *destroyed;

PUBLIC struct handle *gpupool_handle(int64_t id) {
  struct handle *h = calloc(1, sizeof(struct handle));
  if (h) h->id = id;
  if (h) h->users = 1;
  return h;
}

PUBLIC struct handle *gpupool_buffer(int64_t id, int32_t element_type, const int64_t *dims, size_t rank,
                                     size_t nbytes, void *device, void *memory) {
  struct handle *h = calloc(1, sizeof(struct handle) + 2 * rank * sizeof(int64_t));
  if (!h) return NULL;
  h->id = id;
  h->users = 1;
  h->element_type = element_type;
  h->rank = rank;
  h->nbytes = nbytes;
  h->device = device;
  h->memory = memory;
  h->dims = h->numbers;
  h->minor_to_major = h->numbers + rank;
  for (size_t i = 0; i < rank; i++) {
    h->dims[i] = dims[i];
    h->minor_to_major[i] = (int64_t)(rank - 1 - i);
  }
  return h;
}

/* Mark a handle as deleted; false where it was. */
PUBLIC bool gpupool_delete(struct handle *h) { return !__atomic_exchange_n(&h->is_deleted, 1, __ATOMIC_ACQ_REL); }

/* Take up to `most` ids of handles that XLA has destroyed, and free these. One thread at a time. */
PUBLIC size_t gpupool_destroyed(int64_t *ids, size_t most) {
  static struct handle *taken;
  if (!taken) taken = __atomic_exchange_n(&destroyed, NULL, __ATOMIC_ACQUIRE);
  size_t count = 0;
  while (taken && count < most) {
    struct handle *next = taken->next;
    ids[count++] = taken->is_deleted ? -taken->id : taken->id;
    free(taken);
    taken = next;
  }
  return count;
}

struct handle_args {
  size_t struct_size;
  void *extension;
  struct handle *handle;
  union {
    void *pointer;
    size_t size;
    int32_t number;
    bool flag;
    struct {
      const int64_t *numbers;
      size_t count;
    } list;
    struct {
      size_t struct_size;
      void *extension;
      size_t tiled_struct_size;
      void *tiled_extension;
      const int64_t *minor_to_major;
      size_t minor_to_major_size;
      const int64_t *tile_dims;
      const size_t *tile_dim_sizes;
      size_t num_tiles;
      int32_t type; /* 0: tiled */
    } layout;
  } out;
};

PUBLIC void *gpupool_destroy(struct handle_args *args) {
  struct handle *h = args->handle;
  if (!h || __atomic_sub_fetch(&h->users, 1, __ATOMIC_ACQ_REL)) return NULL;
  h->next = __atomic_load_n(&destroyed, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(&destroyed, &h->next, h, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
  }
  return NULL;
}

#define GETTER(name, statement)                  \
  PUBLIC void *name(struct handle_args *args) {  \
    struct handle *h = args->handle;             \
    (void)h;                                     \
    statement;                                   \
    return NULL;                                 \
  }

GETTER(gpupool_element_type, args->out.number = h->element_type)
GETTER(gpupool_dimensions, args->out.list.numbers = h->dims; args->out.list.count = h->rank)
GETTER(gpupool_dynamic_dimensions, args->out.list.numbers = NULL; args->out.list.count = 0)
GETTER(gpupool_nbytes, args->out.size = h->nbytes)
GETTER(gpupool_device, args->out.pointer = h->device)
GETTER(gpupool_memory, args->out.pointer = h->memory)
GETTER(gpupool_is_deleted, args->out.flag = __atomic_load_n(&h->is_deleted, __ATOMIC_ACQUIRE) != 0)
GETTER(gpupool_false, args->out.flag = false)
GETTER(gpupool_true, args->out.flag = true)

PUBLIC void *gpupool_layout(struct handle_args *args) {
  struct handle *h = args->handle;
  args->out.layout.minor_to_major = h->minor_to_major;
  args->out.layout.minor_to_major_size = h->rank;
  args->out.layout.tile_dims = NULL;
  args->out.layout.tile_dim_sizes = NULL;
  args->out.layout.num_tiles = 0;
  args->out.layout.type = 0;
  return NULL;
}

/* -- programs */

/* What is known of a program as long as it has a handle. The numbers are Python's memory. */
struct program {
  size_t num_replicas;
  size_t num_partitions;
  size_t num_outputs; /* of each device */
  const int32_t *element_types;
  const size_t *ranks;
  const size_t *nbytes;
  const int64_t *dims; /* of all outputs, one after the other */
  size_t num_donated;
  const size_t *donated;
  void *const *devices; /* of the replicas, one after the other */
  void *const *memories;
};

PUBLIC struct handle *gpupool_program(int64_t id, const struct program *program) {
  struct handle *h = gpupool_handle(id);
  if (h) h->program = program;
  return h;
}

GETTER(gpupool_num_replicas, args->out.size = h->program->num_replicas)
GETTER(gpupool_num_partitions, args->out.size = h->program->num_partitions)
GETTER(gpupool_num_outputs, args->out.size = h->program->num_outputs)
GETTER(gpupool_same, __atomic_add_fetch(&h->users, 1, __ATOMIC_ACQ_REL); args->out.pointer = h)

struct execute_args {
  size_t struct_size;
  void *extension;
  struct handle *executable;
  struct {
    size_t struct_size;
    void *extension;
    void *callbacks[2];
    size_t num_callbacks[2];
    int32_t launch_id;
    const int64_t *non_donatable;
    size_t num_non_donatable;
  } * options;
  struct handle ***argument_lists;
  size_t num_devices;
  size_t num_args;
  struct handle ***output_lists;
  struct event **device_complete_events;
};

/* The ids of all inputs, those of a device together; false where one of them is deleted. */
PUBLIC bool gpupool_inputs(struct execute_args *args, int64_t *ids) {
  bool usable = true;
  for (size_t d = 0; d < args->num_devices; d++)
    for (size_t i = 0; i < args->num_args; i++) {
      struct handle *h = args->argument_lists[d][i];
      *ids++ = h->id;
      if (__atomic_load_n(&h->is_deleted, __ATOMIC_ACQUIRE)) usable = false;
    }
  return usable;
}

static bool is_kept(const struct execute_args *args, size_t input) {
  for (size_t i = 0; i < args->options->num_non_donatable; i++)
    if (args->options->non_donatable[i] == (int64_t)input) return true;
  return false;
}

PUBLIC struct event *gpupool_event(bool is_ready);

/* Delete the inputs that a program takes over, and make its outputs, whose ids begin with `first`, and its events. */
PUBLIC bool gpupool_outputs(struct execute_args *args, int64_t first, bool is_ready) {
  const struct program *p = args->executable->program;
  for (size_t d = 0; d < args->num_devices; d++) {
    for (size_t i = 0; i < p->num_donated; i++)
      if (p->donated[i] < args->num_args && !is_kept(args, p->donated[i]))
        __atomic_store_n(&args->argument_lists[d][p->donated[i]]->is_deleted, 1, __ATOMIC_RELEASE);
    const int64_t *dims = p->dims;
    for (size_t k = 0; k < p->num_outputs; k++) {
      struct handle *h = gpupool_buffer(first++, p->element_types[k], dims, p->ranks[k], p->nbytes[k], p->devices[d],
                                        p->memories[d]);
      if (!h) return false;
      args->output_lists[d][k] = h;
      dims += p->ranks[k];
    }
    if (args->device_complete_events && !(args->device_complete_events[d] = gpupool_event(is_ready))) return false;
  }
  return true;
}

/* -- events */

typedef void callback(struct error *error, void *user_arg);

struct waiter {
  struct waiter *next;
  callback *call;
  void *user_arg;
};

struct event {
  void *functions;
  int32_t users; /* XLA, and Python until it has set the event */
  bool is_ready;
  int32_t code;
  size_t size;
  char *text;
  struct waiter *waiters;
};

struct event_args {
  size_t struct_size;
  void *extension;
  struct event *event;
  callback *call;
  void *user_arg;
};

struct is_ready_args {
  size_t struct_size;
  void *extension;
  struct event *event;
  bool is_ready;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

PUBLIC struct event *gpupool_event(bool is_ready) {
  struct event *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  e->users = is_ready ? 1 : 2;
  e->is_ready = is_ready;
  return e;
}

static void leave(struct event *e) {
  if (__atomic_sub_fetch(&e->users, 1, __ATOMIC_ACQ_REL)) return;
  free(e->text);
  free(e);
}

static struct error *error_of(const struct event *e) { return gpupool_error(e->code, e->text ? e->text : "", e->size); }

/* Let an event be ready, with an error unless `code` is 0. Calls who waits. Once, and then Python forgets it. */
PUBLIC void gpupool_set(struct event *e, int32_t code, const char *text, size_t size) {
  char *copy = NULL;
  if (code && (copy = malloc(size + 1))) memcpy(copy, text, size);
  pthread_mutex_lock(&lock);
  e->code = code;
  e->text = copy;
  e->size = copy ? size : 0;
  __atomic_store_n(&e->is_ready, true, __ATOMIC_RELEASE);
  struct waiter *w = e->waiters;
  e->waiters = NULL;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  while (w) {
    struct waiter *next = w->next;
    w->call(error_of(e), w->user_arg);
    free(w);
    w = next;
  }
  leave(e);
}

PUBLIC void *gpupool_event_destroy(struct event_args *args) {
  if (args->event) leave(args->event);
  return NULL;
}

PUBLIC void *gpupool_event_is_ready(struct is_ready_args *args) {
  args->is_ready = __atomic_load_n(&args->event->is_ready, __ATOMIC_ACQUIRE);
  return NULL;
}

PUBLIC void *gpupool_event_error(struct event_args *args) {
  return __atomic_load_n(&args->event->is_ready, __ATOMIC_ACQUIRE) ? error_of(args->event) : NULL;
}

PUBLIC void *gpupool_event_await(struct event_args *args) {
  pthread_mutex_lock(&lock);
  while (!args->event->is_ready) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  return error_of(args->event);
}

PUBLIC void *gpupool_event_on_ready(struct event_args *args) {
  struct event *e = args->event;
  struct waiter *w = malloc(sizeof *w);
  if (!w) return &out_of_host_memory;
  w->call = args->call;
  w->user_arg = args->user_arg;
  pthread_mutex_lock(&lock);
  bool is_ready = e->is_ready;
  if (!is_ready) {
    w->next = e->waiters;
    e->waiters = w;
  }
  pthread_mutex_unlock(&lock);
  if (is_ready) {
    free(w);
    args->call(error_of(e), args->user_arg);
  }
  return NULL;
}
