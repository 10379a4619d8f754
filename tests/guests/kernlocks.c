/* For Linux guests, a module: makes the kernel itself take locks that lie across two cache lines. `echo N >/proc/kernlocks`
 * makes N, each in the kernel's _raw_spin_lock, and N / 2 more in the module's own function.
 *
 * A kernel that has started with one CPU has replaced the LOCK prefixes of its code, unless it was told `noreplace-smp`. */
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>

static char memory[128] __aligned(128);

static noinline void kernlocks_own(void)
{
	asm volatile("lock; incl (%0)" : : "r"(memory + 62) : "memory");
}

static ssize_t kernlocks_write(struct file *file, const char __user *text, size_t size, loff_t *at)
{
	spinlock_t *across = (spinlock_t *)(memory + 62); /* 4 bytes: a line is 64 */
	unsigned long n;
	int error = kstrtoul_from_user(text, size, 0, &n);

	if (error)
		return error;
	memory[62] = memory[65] = 0;
	for (unsigned long i = 0; i < n; i++) {
		spin_lock(across);
		spin_unlock(across);
	}
	for (unsigned long i = 0; i < n / 2; i++)
		kernlocks_own();
	return size;
}

static const struct proc_ops operations = {.proc_write = kernlocks_write};

static int __init kernlocks_init(void)
{
	return proc_create("kernlocks", 0200, NULL, &operations) ? 0 : -ENOMEM;
}

static void __exit kernlocks_exit(void)
{
	remove_proc_entry("kernlocks", NULL);
}

module_init(kernlocks_init);
module_exit(kernlocks_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("makes split locks in the kernel");
